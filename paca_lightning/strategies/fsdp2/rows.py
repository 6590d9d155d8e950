"""Reading single rows of the tensors in a Hugging Face checkpoint."""

from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.reading import parse_json
from paca_lightning.core.unchanged import Stamp, check_unchanged

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}


class RowReader:
    """Reads the tensors of a safetensors checkpoint by rows: of one file, or of several with an index.

    Files are mapped into memory. Only rows that are asked for are read, and they take no memory of the process until
    they are copied.

    Args:
        directory: Contains ``model.safetensors``, or ``model.safetensors.index.json`` and the files that it lists.

    Attributes:
        bytes_read: Bytes that this reader has read so far.
        stamps: Of each file, as it was opened.

    Raises:
        PaCAError: If a file is missing, truncated, or lacks a tensor that the index promises.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        self.stamps: dict[Path, Stamp | None] = {}
        self._slices: dict[str, Any] = {}
        self._file_of = self._weight_map()
        for file in sorted(set(self._file_of.values())):
            self._open(file)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, file by file."""
        return list(self._slices)

    def file_of(self, name: str) -> Path:
        """The file that contains a tensor."""
        return self.directory / self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return tuple(self._slices[name].get_shape())

    def size(self, name: str, rows: slice) -> int:
        """Size in bytes of some rows of a tensor. A scalar has its full size for any rows."""
        shape = self.shape(name)
        numbers = prod(shape[1:]) * (rows.stop - rows.start) if shape else 1
        return numbers * BITS.get(self._slices[name].get_dtype(), 8) // 8

    def read(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor, as a view of the mapped file. A scalar is returned whole."""
        self.bytes_read += self.size(name, rows)
        tensor = self._slices[name]
        return tensor[rows] if self.shape(name) else tensor[...]

    def check_unchanged(self) -> None:
        """Raise if a file is no longer the one that was opened.

        Raises:
            PaCAError: Naming it.
        """
        check_unchanged(self.stamps, {path: Stamp.of(path) for path in self.stamps})

    def _weight_map(self) -> dict[str, str]:
        index = self.directory / INDEX
        if not index.is_file():
            if not (self.directory / SINGLE).is_file():
                raise PaCAError(f"{str(self.directory)!r} has neither {INDEX} nor {SINGLE}: no weights to load.")
            return dict.fromkeys(self._handle(SINGLE, "every tensor").keys(), SINGLE)
        self.stamps[index] = Stamp.of(index)
        try:
            weight_map = parse_json(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise PaCAError(f"{str(index)!r} is not an index of safetensors files: {error!r}.") from error
        for name, file in weight_map.items():
            if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file:
                raise PaCAError(f"{str(index)!r} says that {name!r} lies in {file!r}, which is no file beside it.")
        return {str(name): str(file) for name, file in weight_map.items()}

    def _open(self, file: str) -> None:
        names = [name for name, its_file in self._file_of.items() if its_file == file]
        handle = self._handle(file, repr(names[0]))
        present = set(handle.keys())
        if lost := [name for name in names if name not in present]:
            raise PaCAError(f"{str(self.directory / file)!r} lacks {lost[0]!r}, which {INDEX} says it holds.")
        self._slices |= {name: handle.get_slice(name) for name in names}

    def _handle(self, file: str, tensor: str) -> Any:
        path = self.directory / file
        self.stamps.setdefault(path, Stamp.of(path))
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise PaCAError(
                f"{str(path)!r}, which holds {tensor}, is missing or truncated ({error}). Download it again."
            ) from error
