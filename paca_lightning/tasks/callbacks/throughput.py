"""Training speed: tokens per second and model FLOPs utilization (MFU)."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.lightning import is_accumulating, should_log
from paca_lightning.core.private.transformers import is_experts
from paca_lightning.core.tokens import count_tokens


def flops_per_token(module: nn.Module, length: int) -> float:
    """FLOPs of a training step per token, from the shapes of the linear layers and the attention.

    Per linear layer and token: 2 in·out FLOPs forward, 2 in·out for the gradient of the input, and 2 per trained
    parameter. That is 6 per weight in full training, and about 4 with frozen weights. Attention adds 12 d·T per layer
    (PaLM, arXiv 2204.02311, appendix B: d features of all heads, T tokens in a row, causality not discounted).
    Of stacked experts count those that a token takes (``num_experts_per_tok``); routers and recomputation do not count.

    Args:
        module: Any module. Layers with ``in_features`` and ``out_features`` count, and Hugging Face's ``Conv1D``. The
            attention's shape is that of the first submodule with a Hugging Face ``config``, if there is one.
        length: Tokens in a row, T.

    Raises:
        PaCAError: If there are stacked experts, and no configuration says how many of them a token takes.
    """
    total = 0.0
    text = None
    columns: set[nn.Module] = set()  # layers beside the weights of experts, which count with them
    for path, part in module.named_modules():
        if part in columns:
            continue
        if is_experts(part):
            columns = columns.union(part.children())
            total += _flops_of_experts(path, part)
        config: Any = getattr(part, "config", None)
        if text is None and hasattr(config, "get_text_config"):
            text = config.get_text_config()
        inputs = getattr(part, "in_features", getattr(part, "nx", None))
        outputs = getattr(part, "out_features", getattr(part, "nf", None))
        if isinstance(inputs, int) and isinstance(outputs, int):
            trained = sum(p.numel() for p in part.parameters(recurse=False) if p.requires_grad)
            total += 4 * inputs * outputs + 2 * trained
    if text is not None:
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        total += 12 * text.num_hidden_layers * text.num_attention_heads * head_size * length
    return total


def _flops_of_experts(path: str, experts: Any) -> float:
    """FLOPs per token of the experts that it takes, of which each has an equal share of all weights."""
    count = getattr(getattr(experts, "config", None), "num_experts_per_tok", None)
    if count is None:
        raise PaCAError(
            f"The FLOPs of {path!r} are unknown: its configuration has no num_experts_per_tok. Leave TokenThroughput "
            "out, or use Lightning's ThroughputMonitor, which can be told them."
        )
    weights = sum(p.numel() for p in experts.parameters(recurse=False) if p.dim() == 3)
    trained = sum(p.numel() for p in experts.parameters() if p.requires_grad and p.dim() == 3)
    return (4 * weights + 2 * trained) * count / experts.num_experts


class TokenThroughput(Callback):
    """Logs ``train/tokens_per_second`` of all devices together and ``train/mfu``, at the trainer's logging steps.

    Padding does not count as tokens. Validation, and anything before the first step, does not count as time. It waits
    for the device at logging steps only; Lightning's ``ThroughputMonitor`` does so at every step.

    Args:
        peak_flops: Peak FLOPs per second of one device. Default: the entry of Lightning's table for the device and
            dtype. Without an entry, as for a CPU, no MFU is logged.

    Raises:
        PaCAError: If ``peak_flops`` is not positive; before the first step, if batches have no ``input_ids``, or if
            a model with stacked experts does not say how many of them a token takes.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and peak_flops <= 0:
            raise PaCAError(f"peak_flops must be positive, not {peak_flops!r}.")
        self.peak_flops = peak_flops
        self._peak: float | None = None
        self._started: float | None = None
        self._paused = 0.0
        self._flops_of_length: dict[int, float] = {}
        self._tokens: Tensor
        self._flops: Tensor

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the device's peak and reset the counters."""
        device = pl_module.device
        self._peak = self.peak_flops or get_available_flops(device, _compute_dtype(trainer, pl_module))
        self._flops_of_length = {1: flops_per_token(pl_module, 1)}  # now, so that what it cannot count ends no step
        self._tokens, self._flops = torch.zeros(2, dtype=torch.float32, device=device).unbind()
        self._started = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock at the first batch, as other callbacks may take long at the start of training."""
        if self._started is None:
            _check_batch(batch)
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Count a batch; log at logging steps."""
        length = batch["input_ids"].shape[-1]
        if length not in self._flops_of_length:
            self._flops_of_length[length] = flops_per_token(pl_module, length)
        tokens = count_tokens(batch)
        self._tokens += tokens
        self._flops += tokens * self._flops_of_length[length]
        if should_log(trainer) and not is_accumulating(trainer):
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counted = torch.stack([self._tokens, self._flops])
        # Reading the sums waits for the device, so the clock is read after the work is done.
        tokens, flops = trainer.strategy.reduce(counted, reduce_op="sum").tolist()
        now = time.perf_counter()
        assert self._started is not None
        seconds, self._started = now - self._started, now
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
        """Resume the clock."""
        if self._started is not None and trainer.state.fn == TrainerFn.FITTING:
            self._started += time.perf_counter() - self._paused


def _check_batch(batch: Any) -> None:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        found = f"the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise PaCAError(
            "TokenThroughput counts tokens in batches that are dictionaries with `input_ids` (rows, length), and there "
            f"is {found}. Leave the callback out, or use Lightning's ThroughputMonitor, which can be told how to count."
        )


def _compute_dtype(trainer: Trainer, module: nn.Module) -> torch.dtype:
    precision = str(trainer.precision)
    if "bf16" in precision:
        return torch.bfloat16
    if "16" in precision:
        return torch.float16
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
