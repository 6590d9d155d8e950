"""Filling a sharded model from a safetensors checkpoint. Each rank reads its rows only."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from paca_lightning.core.dtensor import local
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import clean_path
from paca_lightning.core.private.torch import non_persistent_buffers
from paca_lightning.core.private.transformers import ignored_keys
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.columns import largest_indices
from paca_lightning.layers.experts import PaCAExperts
from paca_lightning.layers.nf4 import CHUNK, quantize_rows, squared_errors
from paca_lightning.layers.nf4_linear import QPaCALinear
from paca_lightning.strategies.fsdp2.agreeing import check_same_files, raise_on_all_ranks
from paca_lightning.strategies.fsdp2.merged_rows import ModelReader
from paca_lightning.strategies.fsdp2.rows import RowReader
from paca_lightning.strategies.fsdp2.sharding import local_rows


@dataclass
class _Destination:
    """A tensor that is filled from the checkpoint: a parameter, a buffer, or the base weight of a PaCA layer."""

    tensor: Tensor
    layer: PaCALayer | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.layer, QPaCALinear):
            return self.layer.out_features, self.layer.in_features
        return tuple(self.tensor.shape)

    @property
    def rows(self) -> slice:
        return local_rows(self.tensor) if self.tensor.dim() else slice(0, 1)

    @torch.no_grad()
    def fill(self, rows: Tensor, name: str) -> None:
        """Fill with this rank's rows of the checkpoint's tensor.

        Raises:
            PaCAError: If the rows cannot be quantized.
        """
        tensor = local(self.tensor)
        if self.layer is None:
            tensor.copy_(rows)
            return
        rows = rows.to(tensor.device)
        _choose_columns(self.layer, rows, name)
        if isinstance(self.layer, QPaCALinear):
            packed, absmax = quantize_rows(rows, name)
            tensor.copy_(packed)
            local(self.layer.absmax).copy_(absmax)
        else:
            tensor.copy_(rows)
        # From the rows as read, which are more precise than a quantized or narrower weight.
        columns = _rows_of(self.layer, rows).index_select(-1, self.layer.paca_indices.to(rows.device))
        local(self.layer.paca_base_columns).copy_(columns)
        local(self.layer.paca_delta).zero_()


def stream(model: nn.Module, directory: str | Path) -> RowReader:
    """Fill a model from a checkpoint: its parameters, persistent buffers, and the base weights of its PaCA layers.

    Rows are quantized as they are read. Base columns are taken from the unquantized rows. The first rank shows the
    progress.

    Args:
        model: Sharded or not, with allocated tensors. The checkpoint names tensors as this module did before its
            conversion.
        directory: Contains ``model.safetensors``, or several files and their index.

    Returns:
        The reader, which has counted the bytes that this rank read.

    Raises:
        PaCAError: On all ranks, if one rank finds a damaged file or a checkpoint of another model, or a file changes
            while they read it.
    """
    reader: RowReader | None = None
    destinations: dict[str, _Destination] = {}
    failure: PaCAError | None = None
    try:
        wanted = dict(_destinations(model))
        reader = ModelReader(directory, model, wanted)
        destinations = _matched(model, reader, wanted)
    except PaCAError as error:
        failure = error
    raise_on_all_ranks(failure)
    assert reader is not None
    check_same_files(reader.stamps)
    raise_on_all_ranks(_fill(reader, destinations))
    return reader


def _fill(reader: RowReader, destinations: dict[str, _Destination]) -> PaCAError | None:
    """Fill all destinations in the order of the files. Returns the first failure, if there is one."""
    failure: PaCAError | None = None
    total = sum(reader.size(name, destination.rows) for name, destination in destinations.items())
    with _progress() as progress:
        task = progress.add_task("Loading", total=total) if progress else None
        for name, destination in destinations.items():
            try:
                destination.fill(reader.read(name, destination.rows), name)
            except PaCAError as error:
                # Continue, because other ranks wait for this rank's scores of later layers. Fail at the end.
                failure = failure or PaCAError(f"{reader.file_of(name)}: {error}")
            if progress and task is not None:
                progress.update(task, completed=reader.bytes_read)
    try:
        reader.check_unchanged()
    except PaCAError as error:
        failure = error
    return failure


def _matched(model: nn.Module, reader: RowReader, wanted: dict[str, _Destination]) -> dict[str, _Destination]:
    """Destinations by name, in the order of the files.

    Raises:
        PaCAError: If the checkpoint lacks a tensor, has one that the model lacks, or has one of another shape.
    """
    found = {name: wanted[name] for name in reader.names if name in wanted}
    for name, destination in found.items():
        if reader.shape(name) != destination.shape:
            raise PaCAError(
                f"{name!r} has shape {reader.shape(name)} in {str(reader.file_of(name))!r} and {destination.shape} in "
                "the model. The checkpoint belongs to another architecture: use the one that the model's config names."
            )
    filled = {id(destination.tensor) for destination in found.values()}
    if missing := [name for name, destination in wanted.items() if id(destination.tensor) not in filled]:
        raise PaCAError(
            f"{str(reader.directory)!r} has no tensor {missing[0]!r} ({len(missing)} are missing). The checkpoint is "
            "incomplete or belongs to another architecture: download it again, or use the model's own."
        )
    if unexpected := _not_ignored(model, [name for name in reader.names if name not in wanted]):
        raise PaCAError(
            f"{str(reader.file_of(unexpected[0]))!r} has a tensor {unexpected[0]!r} that the model lacks "
            f"({len(unexpected)} such tensors). The checkpoint belongs to another architecture: use the model's own."
        )
    return found


def _destinations(model: nn.Module) -> Iterator[tuple[str, _Destination]]:
    """All tensors that a checkpoint fills. A tied tensor comes once for each of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{clean_path(path)}." if path else ""
        if isinstance(module, PaCALayer):
            if isinstance(module, PaCAExperts):  # it comes after the module that holds the parameter
                yield module.base_path(clean_path(path)), _Destination(module.base, module)
                continue
            if not issubclass(module.paca_base_class, nn.Linear):
                raise PaCAError(
                    f"{path!r} was a {module.paca_base_class.__name__}, whose weight is transposed, so it cannot be "
                    "read by rows. Load the whole model, or exclude the layer with exclude_modules."
                )
            yield f"{prefix}weight", _Destination(module.base, module)
            if isinstance(module.bias, Tensor):
                yield f"{prefix}bias", _Destination(module.bias)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            yield prefix + name, _Destination(parameter)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in non_persistent_buffers(module):
                yield prefix + name, _Destination(buffer)


def _not_ignored(model: nn.Module, names: list[str]) -> list[str]:
    """Those names of a checkpoint's tensors that the model neither computes itself nor declares that it ignores."""
    computed = {name for name, _ in model.named_buffers()}
    patterns = {pattern for module in model.modules() for pattern in ignored_keys(module)}
    return [name for name in names if name not in computed and not any(re.search(one, name) for one in patterns)]


def _choose_columns(layer: PaCALayer, rows: Tensor, name: str) -> None:
    """Choose the columns of a layer that was converted on meta, by scores summed over the rows of all ranks."""
    pending = layer.paca_pending
    if pending is None or pending.by_data:
        return
    layer.paca_pending, selection = None, pending.score
    failure: PaCAError | None = None
    scores = torch.zeros(layer.in_features, device=rows.device)
    try:
        scores += (
            squared_errors(rows, name)
            if selection == "quant_error"
            else _squared_norms(_rows_of(layer, rows).flatten(0, -2))
        )
    except PaCAError as error:
        failure = error
    if isinstance(layer.base, DTensor):
        mesh = layer.base.device_mesh
        dist.all_reduce(scores, group=mesh.get_group(mesh.ndim - 1))
    if failure:
        raise failure
    layer.paca_indices.copy_(largest_indices(scores, layer.r))


def _rows_of(layer: PaCALayer, weight: Tensor) -> Tensor:
    """A view of some rows of a layer's weight that ends with (out_features, in_features)."""
    return layer.rows(weight) if isinstance(layer, PaCAExperts) else weight


def _squared_norms(rows: Tensor) -> Tensor:
    """Sum of squares of each column, computed over a few rows at a time."""
    chunks = rows.split(max(1, CHUNK // rows.shape[1]))
    return sum((c.float().square().sum(0) for c in chunks), torch.zeros(rows.shape[1], device=rows.device))


def _progress() -> AbstractContextManager[Progress | None]:
    if dist.is_initialized() and dist.get_rank() > 0:
        return nullcontext()
    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    )
