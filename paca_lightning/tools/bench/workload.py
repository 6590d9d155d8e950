"""What is measured: a model, batches of random tokens, and how a training step runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from paca_lightning.activation_checkpointing.blocks import checkpoint_blocks, find_blocks
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import looks_local, where_it_was_sought
from paca_lightning.tasks.liger import check_liger, use_liger
from paca_lightning.tools.presets import preset_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training step, the same for every method. It consists of plain values, so that a fresh process can repeat it.

    Args:
        model: Hub id or local directory of a causal language model. Give this or ``preset``.
        preset: Name of a known shape, with random weights.
        pretrained: Whether to read the model's weights; otherwise they are random.
        layers: Use this many layers, the first ones. Default: all.
        dtype: Of weights and computation: bf16, fp16 or fp32.
        batch: Sequences in a micro-batch, on each rank.
        tokens: Length of a sequence.
        accumulate: Micro-batches in an optimizer step.
        checkpointing: Recompute each block in the backward instead of saving its activations. selective: save the
            outputs of GEMMs and attention.
        compile: Compile each block with ``torch.compile``.
        attention: Attention implementation of transformers, such as ``flash_attention_2``. Default: the model's.
        liger: Use Liger's kernels for norms and activations.
        device: Type of device: cpu, cuda, ...
        ranks: Processes that train together with DDP, each on its own device.
        threads: CPU threads of each process.
        seed: Of the random weights and tokens.

    Raises:
        PaCAError: If a value is outside its range, or neither or both of model and preset are given.
    """

    model: str | None = None
    preset: str | None = None
    pretrained: bool = True
    layers: int | None = None
    dtype: str = "bf16"
    batch: int = 1
    tokens: int = 512
    accumulate: int = 1
    checkpointing: bool | Literal["selective"] = False
    compile: bool = False
    attention: str | None = None
    liger: bool = False
    device: str = "cpu"
    ranks: int = 1
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.model is None) == (self.preset is None):
            raise PaCAError("Give either a model (hub id or directory) or a preset to measure.")
        if self.dtype not in DTYPES:
            raise PaCAError(f"dtype={self.dtype!r} is unknown. Choose one of {', '.join(DTYPES)}.")
        for name in ("layers", "batch", "tokens", "accumulate", "ranks", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PaCAError(f"{name} must be at least 1, not {value}.")
        if self.liger:
            check_liger()
        if self.tokens > self.longest:
            raise PaCAError(f"tokens={self.tokens} is more than the model's {self.longest} positions.")

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration, cut to ``layers``.

        Raises:
            PaCAError: If there is no such model or preset, or it has fewer layers.
        """
        config = _read_config(self.model) if self.model is not None else preset_config(str(self.preset))
        if self.layers is not None:
            if self.layers > config.num_hidden_layers:
                raise PaCAError(f"layers={self.layers} is more than the model's {config.num_hidden_layers}.")
            config.num_hidden_layers = self.layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[: self.layers]
        config.use_cache = False
        return config

    @property
    def longest(self) -> float:
        """The longest sequence that the model can take: learned positions bound it, rotary ones do not."""
        config = self.config
        return float("inf") if getattr(config, "rope_parameters", None) else config.max_position_embeddings

    def build(self) -> nn.Module:
        """Build the model on the device, in train mode, with nothing frozen."""
        torch.manual_seed(self.seed)
        config = self.config
        if self.model is None or not self.pretrained:
            model = self._random(config)
        else:
            model = self._pretrained(config)
            for parameter in model.parameters():
                # A copy, as the pages of the mapped file would count as this process' memory while one is in use.
                parameter.data = parameter.data.clone()
        if self.liger:
            use_liger(model)
        if self.checkpointing:
            checkpoint_blocks(find_blocks(model), selective=self.checkpointing == "selective")
        return model.train().to(self.device)

    def skeleton(self) -> nn.Module:
        """The model without weights, on the meta device."""
        with torch.device("meta"):
            return self._random(self.config)

    def _pretrained(self, config: PretrainedConfig) -> Any:
        try:
            settings: Any = {"dtype": DTYPES[self.dtype], "attn_implementation": self.attention, "config": config}
            return AutoModelForCausalLM.from_pretrained(str(self.model), trust_remote_code=False, **settings)
        except OSError as error:
            raise PaCAError(f"The weights of {self.model!r} cannot be read: {error}") from error

    def _random(self, config: PretrainedConfig) -> Any:
        try:
            settings = {"dtype": DTYPES[self.dtype], "attn_implementation": self.attention}
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)
        except (ImportError, ValueError) as error:
            raise PaCAError(f"The model cannot use attention={self.attention!r}: {error}") from error

    def micro_batch(self, number: int) -> dict[str, Tensor]:
        """Random tokens of shape (batch, tokens), the same for a number in every method and run."""
        generator = torch.Generator().manual_seed(self.seed + number)
        shape = (self.batch, self.tokens)
        ids = torch.randint(self.config.vocab_size, shape, generator=generator).to(self.device)
        return {"input_ids": ids, "labels": ids}


def _read_config(model: str) -> PretrainedConfig:
    if looks_local(model) and not Path(model).expanduser().is_dir():
        raise PaCAError(f"The model directory {model!r} does not exist ({where_it_was_sought(model)}).")
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PaCAError(f"No model can be read from {model!r}: {error}") from error
