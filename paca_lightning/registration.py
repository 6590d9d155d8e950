"""Makes ours known to Lightning: strategies and the accelerator by name, callbacks by class for LightningCLI.

Lightning takes seconds to import, so ``import paca_lightning`` does not do it. Instead, what Lightning must know is
registered when Lightning itself is imported, by a finder on ``sys.meta_path`` that does nothing else.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

LIGHTNING = "lightning.pytorch"


def register_with_lightning() -> None:
    """Register now if Lightning is imported already, otherwise as soon as it is."""
    if LIGHTNING in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())


def _register() -> None:
    """Import the modules that register names, and the callbacks: LightningCLI finds classes that are defined.

    And let modules check what they load: ``load_from_checkpoint`` runs no callback.
    """
    import paca_lightning.callbacks.adapter_checkpoint
    import paca_lightning.callbacks.adapter_history
    import paca_lightning.callbacks.bottleneck_strategy
    import paca_lightning.callbacks.loreft_strategy
    import paca_lightning.callbacks.paca
    import paca_lightning.callbacks.peft_strategy
    import paca_lightning.callbacks.projected_gradients
    import paca_lightning.strategies  # noqa: F401
    from paca_lightning.callbacks.plain_modules import check_plain_modules

    check_plain_modules()


class _RegisterAfterImport(MetaPathFinder):
    """Finds Lightning where other finders do, and registers at the end of its import.

    Python holds a lock on a module while it is imported: other threads that import Lightning wait until everything is
    registered. If the import or the registration fails, the error is the importer's and the next import tries again.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of Lightning, whose loader also registers; nothing for any other module."""
        if fullname != LIGHTNING:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()
            sys.meta_path.remove(self)

        # On this loader alone: a class around it would hide its other methods, such as get_source.
        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
