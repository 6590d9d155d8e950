"""Reading rows of a checkpoint's tensors under a model's names, also where the model stacks experts in one tensor."""

from collections.abc import Container
from pathlib import Path

import torch
from torch import Tensor, nn

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.transformers import MergedTensor, is_pretrained_model, names_in_model
from paca_lightning.strategies.fsdp2.rows import RowReader


class ModelReader(RowReader):
    """Reads rows of the tensors of a model from a checkpoint whose files may hold each expert by itself.

    Names and stacks are those that ``from_pretrained`` makes. Of a stack, only the experts that are asked for are read.

    Args:
        directory: As for :class:`RowReader`.
        model: That will be filled. Only Hugging Face models have rules for names.
        wanted: Names of its tensors.

    Raises:
        PaCAError: As :class:`RowReader`.
    """

    def __init__(self, directory: str | Path, model: nn.Module, wanted: Container[str]) -> None:
        super().__init__(directory)
        self._renamed: dict[str, str] = {}
        self._merged: dict[str, MergedTensor] = {}
        if is_pretrained_model(model):
            self._renamed, self._merged = names_in_model(model, super().names, wanted)

    @property
    def names(self) -> list[str]:
        """The model's names of the tensors, where it has some, file by file."""
        by_source = {source: name for name, source in self._renamed.items()}
        for name, tensor in self._merged.items():
            by_source |= {source: name for sources in tensor.parts.values() for source in sources}
        return list(dict.fromkeys(by_source.get(name, name) for name in super().names))

    def file_of(self, name: str) -> Path:
        """The file that contains a tensor, or the first part of it."""
        return super().file_of(self._parts(name)[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor.

        Raises:
            PaCAError: If parts of it are missing, or do not fit together.
        """
        if name not in self._merged:
            return super().shape(self._renamed.get(name, name))
        tensor = self._merged[name]
        parts = {
            kind: [torch.empty(super(ModelReader, self).shape(part), device="meta") for part in sources]
            for kind, sources in tensor.parts.items()
        }
        try:
            return tuple(tensor.merge(parts).shape)
        except RuntimeError as error:
            raise PaCAError(
                f"{str(self.directory)!r} holds {name!r} in parts that do not fit together ({error}). Some experts are "
                "missing or of another size: download it again."
            ) from error

    def size(self, name: str, rows: slice) -> int:
        """Size in bytes of some rows of a tensor."""
        if name not in self._merged:
            return super().size(self._renamed.get(name, name), rows)
        return sum(super(ModelReader, self).size(part, self._all(part)) for part in self._parts(name, rows))

    def read(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor, as a view of the mapped file, or stacked."""
        if name not in self._merged:
            return super().read(self._renamed.get(name, name), rows)
        if rows.start == rows.stop:  # more ranks than experts
            return torch.empty(0, *self.shape(name)[1:])
        tensor = self._merged[name]
        read = super().read
        return tensor.merge({k: [read(part, self._all(part)) for part in s[rows]] for k, s in tensor.parts.items()})

    def _parts(self, name: str, rows: slice = slice(None)) -> list[str]:
        """The checkpoint's names of some rows of a tensor."""
        if name not in self._merged:
            return [self._renamed.get(name, name)]
        return [part for sources in self._merged[name].parts.values() for part in sources[rows]]

    def _all(self, part: str) -> slice:
        shape = super().shape(part)
        return slice(0, shape[0] if shape else 1)
