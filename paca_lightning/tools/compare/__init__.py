"""``paca-lightning compare``: methods of fine-tuning side by side on a config's run, and ``fit --lr auto``.

``command`` ties it together: ``task`` reads a config, ``parsing`` the methods (``methods``, ``peft_methods``), ``runs``
says which ``trial`` is next, by the ``search`` for a learning rate, ``pool`` runs trials as processes whose
``recorder`` writes their results, ``cost`` measures a step with the code of ``bench``, and ``results`` and ``plots``
show it all. ``auto`` is the search alone, for ``fit``.
May import all that ``tools`` may. Optuna and PEFT are imported when used.
"""
