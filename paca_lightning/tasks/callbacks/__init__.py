"""Callbacks around a fine-tuning run: losses, speed, sample answers, plots and the progress bar.

Each measures or shows something and leaves the training as it is; none knows of PaCA. The classes for configs are
exported by :mod:`paca_lightning.tasks`. These modules may import `core`, `strategies` and the rest of `tasks`.
Limits: they expect one optimizer, and a module that keeps its Hugging Face model in the attribute ``model``.
"""
