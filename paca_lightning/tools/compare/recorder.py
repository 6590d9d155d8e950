"""TrialRecorder: the callback that writes down how a run of a comparison went."""

import json
import math
import resource
import statistics
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from typing_extensions import override

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import replacing
from paca_lightning.core.private.lightning import is_accumulating


class TrialRecorder(Callback):
    """Writes the metrics and the cost of a finished run to a JSON file: aside first, then renamed.

    It also validates after the last step, whatever interval the run has. The file holds ``final`` (the metrics after
    the last step; not finite: null), ``before`` (those before training, if the sanity check covered all validation
    data), ``curve`` (the metrics of each validation with its ``step`` and ``seconds`` of training), ``steps``,
    ``trained_parameters``, ``adapter_bytes`` (what a checkpoint holds of the model), ``batch_shape`` (medians),
    ``rows_checksum`` (of the first rank's training batches in their order), ``step_seconds`` (median) and
    ``peak_bytes``.

    Args:
        path: File to write.
        metric: Name of the metric that is compared.

    Raises:
        PaCAError: If the run has no validation, or validation does not log the metric.
    """

    def __init__(self, path: str, metric: str) -> None:
        self.path = path
        self.metric = metric
        self._record: dict[str, Any]
        self._seconds: list[float]
        self._shapes: list[tuple[int, ...]]
        self._checksum: int
        self._started: float
        self._last_step: float

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run."""
        self._record = {"before": None, "curve": []}
        self._seconds, self._shapes, self._checksum = [], [], 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is validation, and note what is trained and how many steps the run will take.

        Raises:
            PaCAError: If there is none.
        """
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        if not sum(trainer.num_val_batches):
            raise PaCAError(
                "A comparison needs validation, and this run has none: give the data module a validation split, the "
                "module a validation_step, and do not set limit_val_batches=0."
            )
        trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        self._record["trained_parameters"] = sum(parameter.numel() for parameter in trained)
        self._last_step = trainer.estimated_stepping_batches

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add the batch to the checksum of all rows, and start the clock."""
        shapes: list[tuple[int, ...]] = []

        def look_at(tensor: Tensor) -> Tensor:
            shapes.append(tuple(tensor.shape))
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            self._checksum = zlib.crc32(content.numpy().tobytes(), self._checksum)
            return tensor

        apply_to_collection(batch, Tensor, look_at)
        self._shapes.append(shapes[0] if shapes else ())
        self._started = time.perf_counter()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Stop the clock, and ask for a validation after the last step."""
        self._seconds.append(time.perf_counter() - self._started)
        if trainer.global_step >= self._last_step and not is_accumulating(trainer):
            trainer.val_check_batch = trainer.check_val_every_n_epoch = 1

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics.

        Raises:
            PaCAError: If the metric is not among them.
        """
        metrics = {
            name: number
            for name, value in trainer.callback_metrics.items()
            if value.numel() == 1 and not name.startswith("train/")
            for number in [float(value)]
        }
        if self.metric not in metrics:
            raise PaCAError(
                f"Validation logs no metric {self.metric!r}, but {sorted(metrics)}. Give one of them as --metric."
            )
        if trainer.sanity_checking:
            if math.isinf(trainer.num_sanity_val_steps):
                self._record["before"] = finite(metrics)
            return
        point = {"step": trainer.global_step, "seconds": sum(self._seconds), **finite(metrics)}
        self._record["curve"] = [p for p in self._record["curve"] if p["step"] != trainer.global_step] + [point]

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file.

        Raises:
            PaCAError: If there was no validation after the last step.
        """
        curve = self._record["curve"]
        if not curve or curve[-1]["step"] != trainer.global_step:
            raise PaCAError(
                f"The run ended at step {trainer.global_step} without a validation after it, so it cannot be compared. "
                "Leave out what ends it early, such as max_time."
            )
        # On all ranks, as sharded tensors are gathered.
        adapter = sum(tensor_bytes(value) for value in trainer.strategy.lightning_module_state_dict().values())
        self._write(trainer, adapter)

    @rank_zero_only
    def _write(self, trainer: Trainer, adapter_bytes: int) -> None:
        last = self._record["curve"][-1]
        per_step = len(self._seconds) / trainer.global_step  # micro-batches
        self._record |= {
            "final": {name: value for name, value in last.items() if name not in ("step", "seconds")},
            "steps": trainer.global_step,
            "adapter_bytes": adapter_bytes,
            "batch_shape": [round(statistics.median(sizes)) for sizes in zip(*self._shapes, strict=False)],
            "rows_checksum": self._checksum,
            "step_seconds": statistics.median(self._seconds) * per_step,
            "peak_bytes": peak_bytes(trainer),
        }
        with replacing(Path(self.path)) as temporary:
            temporary.write_text(json.dumps(self._record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """Metrics with None for what is not finite, as JSON has no such numbers."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def tensor_bytes(value: Any) -> int:
    """Bytes of an entry of a state dict; 0 if it is no tensor."""
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def peak_bytes(trainer: Trainer) -> int:
    """Peak of the allocator on an accelerator; on the CPU, of the process' resident memory."""
    if trainer.strategy.root_device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
