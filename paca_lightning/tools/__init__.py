"""Commands beside training: measure, estimate, export, generate."""
