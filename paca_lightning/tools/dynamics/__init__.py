"""``paca-lightning dynamics``: what a model learned when, measured on the adapters of a history.

``options`` and ``command`` are the command line; ``run`` builds the run that made the history, and ``row_sets`` the
rows it is measured on. ``recitation`` and ``movement`` measure one point; ``points`` goes along the history, and
``store`` keeps what is done. ``tables``, ``plots`` and ``page`` show it.
"""
