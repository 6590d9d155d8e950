"""A patch that lets Lightning choose HPUs for ``accelerator="auto"`` and ``strategy="auto"``.

Lightning's accelerator connector raises for ``accelerator="hpu"`` with ``strategy="auto"``, and does not consider
registered accelerators for ``accelerator="auto"``. The patch wraps the three methods that make these choices
(``lightning/pytorch/trainer/connectors/accelerator_connector.py``, read in 2.6.6), and refuses strategies that do not
run on HPUs. It is applied only where the Gaudi software is installed.
"""

import functools
from typing import Any

import lightning
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn

from paca_lightning.core.errors import PaCAError
from paca_lightning.strategies.hpu.accelerator import HPUAccelerator
from paca_lightning.strategies.hpu.bridge import why_unavailable
from paca_lightning.strategies.hpu.mixins import HPUStrategyMixin

# What the patch relies on. For each method: the names of its arguments (None: any), and names that its code uses.
_EXPECTED: dict[str, tuple[tuple[str, ...] | None, tuple[str, ...]]] = {
    "__init__": (None, ("_choose_auto_accelerator", "_choose_strategy", "_check_strategy_and_fallback")),
    "_choose_auto_accelerator": ((), ()),
    "_set_parallel_devices_and_init_accelerator": (("self",), ("accelerator", "_parallel_devices")),
    "_choose_strategy": (("self",), ("_parallel_devices", "_num_nodes_flag")),
    "_check_strategy_and_fallback": (("self",), ("_strategy_flag",)),
}


def patch_connector(connector: type[Any]) -> None:
    """Wrap the methods of Lightning's accelerator connector that choose accelerator and strategy. Does so once.

    Raises:
        PaCAError: If the class differs from what this module expects. Nothing is patched then.
    """
    if getattr(connector, "_paca_patched", False):
        return
    _check_expectations(connector)
    auto_accelerator, auto_strategy = connector._choose_auto_accelerator, connector._choose_strategy
    check_strategy = connector._check_strategy_and_fallback

    @functools.wraps(auto_accelerator)
    def choose_auto_accelerator() -> str:
        chosen: str = auto_accelerator()
        if chosen != "cpu":
            return chosen
        if reason := why_unavailable():
            rank_zero_warn(f"Training on the CPU although the Gaudi software is installed: {reason}.")
            return chosen
        return "hpu"

    @functools.wraps(auto_strategy)
    def choose_strategy(self: Any) -> Strategy | str:
        if not isinstance(self.accelerator, HPUAccelerator):
            strategy: Strategy | str = auto_strategy(self)
            return strategy
        return "hpu_ddp" if len(self._parallel_devices) > 1 or self._num_nodes_flag > 1 else "hpu_single"

    @functools.wraps(check_strategy)
    def check_strategy_and_fallback(self: Any) -> None:
        check_strategy(self)
        flag = self._strategy_flag
        strategy = StrategyRegistry[flag]["strategy"] if isinstance(flag, str) else type(flag)
        if isinstance(self.accelerator, HPUAccelerator) and not issubclass(strategy, HPUStrategyMixin):
            raise PaCAError(
                f"strategy {(flag if isinstance(flag, str) else strategy.__name__)!r} does not run on HPU. Use 'auto', "
                "'hpu_single' for one card, 'hpu_ddp' for several cards, or 'hpu_fsdp2' to shard the model."
            )

    connector._choose_auto_accelerator = staticmethod(choose_auto_accelerator)
    connector._choose_strategy = choose_strategy
    connector._check_strategy_and_fallback = check_strategy_and_fallback
    connector._paca_patched = True


def _check_expectations(connector: type[Any]) -> None:
    problems = []
    for name, (arguments, used) in _EXPECTED.items():
        method = getattr(connector, name, None)
        if method is None:
            problems.append(f"{name} is gone")
            continue
        code = method.__code__
        if arguments is not None and code.co_varnames[: code.co_argcount] != arguments:
            problems.append(f"{name} takes other arguments")
        problems += [f"{name} no longer uses {word}" for word in used if word not in code.co_names]
    if problems:
        raise PaCAError(
            f"paca_lightning's HPU support does not know Lightning {lightning.__version__}. In its accelerator "
            f"connector: {'; '.join(problems)}. Install a version that docs/gaudi.md lists, such as lightning==2.6.6."
        )
