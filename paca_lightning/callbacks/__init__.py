"""PaCAStrategy and the callbacks around it."""
