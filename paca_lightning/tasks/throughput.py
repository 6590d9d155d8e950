"""Speed of training: tokens per second, and model FLOPs utilization (MFU)."""

import time
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from paca_lightning.errors import PaCAError


def flops_per_token(module: nn.Module, length: int) -> float:
    """Floating-point operations that training on one token needs, by the shapes of the linear layers and attention.

    Per linear layer and token, with 2 FLOPs to a multiplication: 2 in·out forward, as many for the gradient of the
    input, and 2 per parameter of the layer that is trained. So 6 per weight in full training, as usual, and hardly
    more than 4 where weights are frozen. Attention adds 12 d·T per layer (PaLM, arXiv 2204.02311, appendix B: d
    features of all heads, T tokens in a row, causality not discounted). Recomputation does not count.

    Args:
        module: Any module; layers are those with ``in_features`` and ``out_features``, and Hugging Face's ``Conv1D``.
            The attention is that of the first submodule with a Hugging Face ``config``, if there is one.
        length: T.
    """
    total = 0.0
    config = None
    for part in module.modules():
        config = config or getattr(part, "config", None)
        inputs = getattr(part, "in_features", getattr(part, "nx", None))
        outputs = getattr(part, "out_features", getattr(part, "nf", None))
        if isinstance(inputs, int) and isinstance(outputs, int):
            trained = sum(p.numel() for p in part.parameters(recurse=False) if p.requires_grad)
            total += 4 * inputs * outputs + 2 * trained
    if config is not None:
        text = config.get_text_config()
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        total += 12 * text.num_hidden_layers * text.num_attention_heads * head_size * length
    return total


class TokenThroughput(Callback):
    """Logs ``train/tokens_per_second`` of all devices together and ``train/mfu``, at the trainer's logging steps.

    Tokens that are padding do not count; validation does not count as time. The device is awaited at logging steps
    only, where Lightning's ``ThroughputMonitor``, whose table of devices this uses, awaits it at every step.

    Args:
        peak_flops: FLOPs per second that one device can do at best. Default: what Lightning's table says of the device
            and dtype. No MFU is logged where it says nothing, as for a CPU.

    Raises:
        PaCAError: If ``peak_flops`` is not positive.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and peak_flops <= 0:
            raise PaCAError(f"peak_flops must be positive, not {peak_flops!r}.")
        self.peak_flops = peak_flops
        self._peak: float | None = None
        self._started = self._paused = 0.0
        self._flops_of_length: dict[int, float] = {}
        self._tokens: Tensor
        self._flops: Tensor

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the device, and start the clock."""
        device = pl_module.device
        self._peak = self.peak_flops or get_available_flops(device, _compute_dtype(trainer, pl_module))
        self._flops_of_length.clear()
        self._tokens, self._flops = torch.zeros(2, dtype=torch.float32, device=device).unbind()
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Count a batch; log at logging steps."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        length = ids.shape[-1]
        if length not in self._flops_of_length:
            self._flops_of_length[length] = flops_per_token(pl_module, length)
        tokens = ids.numel() if mask is None else mask.sum()
        self._tokens += tokens
        self._flops += tokens * self._flops_of_length[length]
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counted = torch.stack([self._tokens, self._flops])
        # Reading the sums awaits the device, so that the clock is read when the work is done.
        tokens, flops = trainer.strategy.reduce(counted, reduce_op="sum").tolist()
        now = time.perf_counter()
        seconds = now - self._started
        self._started = now
        self._tokens.zero_()
        self._flops.zero_()
        pl_module.log("train/tokens_per_second", torch.tensor(tokens / seconds, dtype=torch.float32))
        if self._peak is not None:
            mfu = flops / seconds / (self._peak * trainer.world_size)
            pl_module.log("train/mfu", torch.tensor(mfu, dtype=torch.float32))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock go on."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._started += time.perf_counter() - self._paused


def _compute_dtype(trainer: Trainer, module: nn.Module) -> torch.dtype:
    precision = str(trainer.precision)
    if "bf16" in precision:
        return torch.bfloat16
    if "16" in precision:
        return torch.float16
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
