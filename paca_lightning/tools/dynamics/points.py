"""Along a history: what is asked of each step, and the measurements that are not done yet."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.progress import Progress

from paca_lightning.adapters.adapter import load_adapter
from paca_lightning.adapters.files import CONFIG, SETTINGS, read_json
from paca_lightning.adapters.history import History
from paca_lightning.core.checksums import settings_checksum, tensor_checksum
from paca_lightning.core.sealed_files import read_checksums
from paca_lightning.other_methods.adapted import AdaptedModel
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.packing_probe import check_packing
from paca_lightning.tools.dynamics.recitation import LONGEST, SHORTEST, Excerpt, recited
from paca_lightning.tools.dynamics.row_sets import RowSet
from paca_lightning.tools.dynamics.run import method_of
from paca_lightning.tools.dynamics.store import Store

LOSS, RECITED = "loss", "recited"


@dataclass
class Measured:
    """What was measured on a set of rows.

    Attributes:
        rows: The set.
        excerpts: Of its rows that are long enough to recite.
        losses: Mean loss of a trained token, by step; None if it is not finite.
        recited: Tokens of each excerpt's continuation that were recited, by step.
    """

    rows: RowSet
    excerpts: list[Excerpt]
    losses: dict[int, float | None] = field(default_factory=dict)
    recited: dict[int, list[int]] = field(default_factory=dict)


class Measurement:
    """Measures rows along a history, with the run's module and on the device of its trainer.

    Args:
        history: The history.
        module: Of the run. Its model is built when something is to be measured.
        trainer: Its device and precision.
        store: Keeps what is measured.
        k: Trained tokens that are shown before the model recites.
    """

    def __init__(self, history: History, module: CausalLMModule, trainer: Trainer, store: Store, k: int) -> None:
        self.history, self.module, self.trainer, self.store, self.k = history, module, trainer, store, k
        self._loaded: int | None = None
        self._adapted: AdaptedModel | None = None  # by another method than PaCA

    def measure(self, results: Sequence[Measured], steps: Sequence[int]) -> None:
        """Measure sets of rows at some steps, or read what is kept, with a progress bar.

        Args:
            results: Get what is measured.
            steps: Of the history.

        Raises:
            PaCAError: If the base model is not that of the history, or a file is damaged.
        """
        digests = [_digest(measured.rows) for measured in results]
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("measuring", total=len(steps) * len(results) * 2)
            for step in steps:
                for measured, digest in zip(results, digests, strict=True):
                    progress.update(task, description=f"step {step}: {measured.rows.name}")
                    for key in self._keys(step, digest):
                        if (result := self.store.get(step, key)) is None:
                            result = {"value": self._made(key["measure"], step, measured)}
                            self.store.put(step, key, result)
                        target: dict[int, Any] = measured.losses if key["measure"] == LOSS else measured.recited
                        target[step] = result["value"]
                        progress.advance(task)

    def _keys(self, step: int, digest: str) -> Iterator[dict[str, Any]]:
        hparams = self.module.hparams
        shared = {
            "adapter": adapter_checksum(self.history.path(step)),
            "rows": digest,
            "model": {name: hparams.get(name) for name in ("model", "revision", "dtype", "attn_implementation")},
            "precision": str(self.trainer.precision),
        }
        yield shared | {"measure": LOSS}
        yield shared | {"measure": RECITED, "k": self.k, "tokens": [SHORTEST, LONGEST]}

    def _made(self, measure: str, step: int, measured: Measured) -> float | list[int] | None:
        self._load(step)
        module, rows = self.module, measured.rows
        assert module.model is not None
        if measure == LOSS:
            check_packing(module, rows.datamodule, module.packed_rows, module.model)
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            if measure == RECITED:
                return recited(module.model, measured.excerpts, rows.datamodule.hparams["batch_size"])
            return mean_loss(module, rows)

    def _load(self, step: int) -> None:
        """Put a step's adapter into the model, which is built before the first one."""
        if step == self._loaded:
            return
        path = self.history.path(step)
        if self._loaded is None:
            self._build(path)
        if self._adapted is None:
            load_adapter(self.module, path)
        else:
            self._adapted.start_from(str(path))
        self.module.eval()
        self._loaded = step

    def _build(self, adapter: Path) -> None:
        """Build the model as a run does: convert or adapt, then cast, then move."""
        self.module.configure_model()
        if (method := method_of(self.trainer)) is None:
            load_adapter(self.module, adapter)
        else:
            self._adapted = method.adapt_base(self.module)
        self.trainer.precision_plugin.convert_module(self.module)
        if self._adapted is not None:
            self._adapted.keep_wide()
        self.module.to(self.trainer.strategy.root_device)


def mean_loss(module: CausalLMModule, rows: RowSet) -> float | None:
    """The mean loss of the trained tokens, as a validation of the module gives it; None if it is not finite."""
    module.val_loss.reset()
    for number, batch in enumerate(rows.batches()):
        moved = {name: tensor.to(module.device) for name, tensor in batch.items()}
        module.validation_step(moved, number)
    loss = float(module.val_loss.compute())
    module.val_loss.reset()
    return loss if math.isfinite(loss) else None


def adapter_checksum(adapter: Path) -> str:
    """A checksum of an adapter's settings and tensors, as its directory tells.

    Raises:
        PaCAError: If the directory does not tell, or is damaged.
    """
    if (adapter / SETTINGS).is_file():
        return str(read_json(adapter / SETTINGS).get("checksum"))
    return settings_checksum({"settings": read_json(adapter / CONFIG), "files": read_checksums(adapter)})


def _digest(rows: RowSet) -> str:
    """A checksum of the rows' tokens, of which are trained, and of where rows begin."""
    parts = [np.asarray([row["input_ids"], row["trained"]], dtype=np.int64) for row in rows.token_rows()]
    starts = np.cumsum([part.shape[1] for part in parts])
    return tensor_checksum(torch.from_numpy(np.concatenate([*(part.ravel() for part in parts), starts])))
