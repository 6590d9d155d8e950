"""A stand-in for the package of the Intel Gaudi software, for tests on the simulated HPU."""
