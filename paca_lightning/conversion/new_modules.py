"""Modules that a model declares as new join those that are trained whole."""

from dataclasses import replace

from paca_lightning.conversion.inventory import Inventory
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.new_modules import declared_new
from paca_lightning.core.paths import matches


def with_new_modules(inventory: Inventory, config: PaCAConfig) -> PaCAConfig:
    """The settings, with the new modules of the model in ``modules_to_save``.

    Those that a setting names already, or leaves out by ``exclude_modules``, are not added.

    Args:
        inventory: Of the model.
        config: What the user set.
    """
    named = [*config.modules_to_save, *config.exclude_modules]
    added = [
        path
        for base in inventory.base_models.values()
        for path in declared_new(base)
        if not any(matches(pattern, path) for pattern in named)
    ]
    return replace(config, modules_to_save=[*config.modules_to_save, *added]) if added else config
