"""The files of an exported adapter, which PEFT and servers read."""

import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paca_lightning.adapters.files import CONFIG, PREFIX, TENSORS, write_json
from paca_lightning.core.dtensor import is_first_rank, whole_tensor
from paca_lightning.core.files import written_aside
from paca_lightning.core.sealed_files import seal_weights


class Tokenizer(Protocol):
    """A tokenizer that can be saved beside a model."""

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Any:
        """Write the tokenizer to a directory."""


def tensors_of(whole: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Copies of the tensors of modules that an adapter holds whole, under PEFT's names.

    It is collective for a sharded model. They are copies because several names may be of one memory.

    Args:
        whole: The modules by their path from the base model.
    """
    return {
        f"{PREFIX}{path}.{name}": whole_tensor(tensor).clone(memory_format=torch.contiguous_format)
        for path, module in whole.items()
        for name, tensor in module.state_dict().items()
    }


def write_adapter(
    directory: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    settings: dict[str, Any],
    tokenizer: Tokenizer | None,
) -> None:
    """Write an adapter on the first rank, beside its place first.

    Args:
        directory: Is created if it does not exist. Files of the same names are replaced.
        tensors: By PEFT's names.
        settings: The content of ``adapter_config.json``.
        tokenizer: Is saved in the same directory.
    """
    if not is_first_rank():
        return
    with written_aside(directory) as scratch:
        save_file(tensors, scratch / TENSORS, metadata={"format": "pt"})
        seal_weights(scratch)
        write_json(scratch / CONFIG, settings)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
