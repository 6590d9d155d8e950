"""The one exception that a user of this package can cause."""


class PaCAError(ValueError):
    """A mistake in the configuration, the model or the data, found before training starts.

    The message says what is wrong, where (module path, or file and row), and what to do about it.
    """
