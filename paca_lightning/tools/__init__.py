"""Commands beside training: what ``paca-lightning`` runs, apart from LightningCLI's own subcommands.

``generate``, ``chat``, ``export`` and ``data`` have a file each; ``bench``, ``compare``, ``dynamics``, ``eval``
(``evaluation``) and ``estimate`` (``memory``) a folder each.
``run_config`` reads a run's config for every command, and ``function_cli`` makes a command line of a function.
May import everything below: no other folder of the package imports this one.
Limits: each command runs in one process that ends with it. None of them trains a model that is kept.
"""
