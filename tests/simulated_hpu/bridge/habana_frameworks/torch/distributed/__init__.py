"""The simulated bridge's collectives."""
