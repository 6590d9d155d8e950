"""A stand-in for the package of the Intel Gaudi software, for tests on the simulated HPU."""


def __autoload() -> None:
    """Loads the bridge at the end of ``import torch``, as Intel's package does (entry point ``torch.backends``)."""
    import habana_frameworks.torch  # noqa: F401
