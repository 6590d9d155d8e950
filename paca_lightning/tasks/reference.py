"""The reference of preference tuning: log-probabilities of answers in the model before training."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from datasets.utils import tqdm
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from paca_lightning.core.base_model import KeepsBaseModel
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.evaluating import evaluating, reshard_units
from paca_lightning.core.private.lightning import trainer_of

KEY = "reference_log_probs"
"""Of what a checkpoint holds of the reference."""

Batch = dict[str, Tensor]


class KnowsItsRows(Protocol):
    """Data whose rows have numbers: what the reference needs to be computed before training."""

    splits: dict[str, Any]

    def reference_loader(self, name: str) -> Iterable[Batch]:
        """Batches of a split, in a fixed order, with this rank's share of the rows."""

    def checksum(self, name: str) -> str:
        """Of all tokens of a split."""


class Reference:
    """Log-probabilities in the model before training, of which no second copy is in memory.

    A callback that keeps the base model (``KeepsBaseModel``: ``PaCAStrategy``, ``PEFTStrategy``) turns it on for a
    forward. Or the values of all rows are computed before the first step and kept: in memory, and in checkpoints. They
    belong to the data by a checksum of their tokens.

    Args:
        cached: Compute the values before training.

    Attributes:
        context: Called for a context in which the model is the reference. Set it where there is no Trainer.
    """

    def __init__(self, cached: bool = False) -> None:
        self.cached = cached
        self.context: Callable[[], AbstractContextManager[None]] | None = None
        self._values: dict[str, Tensor] = {}  # of each split: (rows, 2), of both answers of a row
        self._data: dict[str, str] = {}  # of each split: the checksum of its tokens

    def find(self, trainer: Trainer) -> None:
        """Look for the callback that keeps the base model.

        Raises:
            PaCAError: There is none, and the values are not to be computed before training, or it cannot give its base
                back.
        """
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        keepers = [callback for callback in callbacks if isinstance(callback, KeepsBaseModel)]
        if keepers:
            self.context = keepers[0].disable
            if keepers[0].adapter is not None:
                rank_zero_warn(
                    f"The reference is the base model, without the adapter {keepers[0].adapter!r} from which the run "
                    "starts. To compare with the adapted model, export it with export_merged and start from that."
                )
        if self.context is not None:
            with self.context():
                pass
        elif not self.cached:
            raise PaCAError(
                "This loss compares with the model before training, and nothing keeps it: all weights are trained. Add "
                "PaCAStrategy or PEFTStrategy, set cache_reference: true to compute its log-probabilities before the "
                "first step, or choose loss: simpo or orpo, which need none."
            )

    @contextmanager
    def active(self, module: LightningModule) -> Iterator[None]:
        """Inside this context the module's model is the reference: in eval mode, without gradients.

        Raises:
            PaCAError: Nothing keeps the model before training, and it has been trained.
        """
        context = self.context or self._untrained(module)
        reshard_units(module)  # FSDP2 may hold gathered weights of another state
        try:
            with torch.no_grad(), context(), evaluating(module):
                yield
        finally:
            reshard_units(module)

    def _untrained(self, module: LightningModule) -> Callable[[], AbstractContextManager[None]]:
        trainer = trainer_of(module)
        if trainer is None or trainer.state.fn != "fit" or trainer.global_step > 0:
            raise PaCAError(
                "The model before training is gone, and the reference log-probabilities of these rows were not "
                "computed with cache_reference: true, or the checkpoint has none of these data. Train from the start."
            )
        return nullcontext

    def of(self, split: str, rows: Tensor) -> Tensor | None:
        """Values of rows by number (B,), if they were computed: of all first answers, then of all second ones (2B,)."""
        if split not in self._values:
            return None
        self._values[split] = self._values[split].to(rows.device)
        return self._values[split][rows].T.flatten()

    def fill(self, module: LightningModule, data: KnowsItsRows) -> None:
        """Compute the values of the training and validation rows, unless a checkpoint had them.

        Args:
            module: In a run. Its ``predict_step``, which is a forward to every strategy, returns ``log_probs`` (2B,).
            data: The rows.
        """
        self.check(data)
        trainer = module.trainer
        for split in ("train", "validation"):
            if split in self._values or split not in data.splits:
                continue
            loader = data.reference_loader(split)
            progress = tqdm(loader, desc=f"Reference of {split}", disable=not trainer.is_global_zero)
            values: Tensor | None = None
            with self.active(module), trainer.precision_plugin.forward_context():
                for batch in progress:
                    batch = trainer.strategy.batch_to_device(batch, module.device)
                    found = module.predict_step(batch, 0)["log_probs"].view(2, -1).T
                    if values is None:
                        values = found.new_zeros(len(data.splits[split].dataset), 2)
                    values[batch["rows"]] = found
            assert values is not None
            self._values[split] = trainer.strategy.reduce(values, reduce_op="sum")  # each row is one rank's
            self._data[split] = data.checksum(split)
            rank_zero_info(f"Reference log-probabilities of {len(values):,} rows of {split} are computed.")

    def check(self, data: KnowsItsRows) -> None:
        """Drop values of a checkpoint that belong to other data.

        Raises:
            PaCAError: They cannot be computed again.
        """
        for split in [split for split in self._values if split in data.splits]:
            if self._data[split] == data.checksum(split):
                continue
            if self.context is None:
                raise PaCAError(
                    f"The checkpoint's reference log-probabilities belong to other {split} data, or to the same rows "
                    "tokenized otherwise, and the model before training is gone. Restore the data, or train anew."
                )
            del self._values[split], self._data[split]

    def state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps."""
        return {name: {"values": values.cpu(), "data": self._data[name]} for name, values in self._values.items()}

    def load(self, state: dict[str, dict[str, Any]]) -> None:
        """Take what a checkpoint has kept."""
        self._values = {name: entry["values"] for name, entry in state.items()}
        self._data = {name: entry["data"] for name, entry in state.items()}
