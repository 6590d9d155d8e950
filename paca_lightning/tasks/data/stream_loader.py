"""A data loader over an endless stream, which saves where each of its readers stands and goes on there."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.lightning import restore_loader_states
from paca_lightning.tasks.data import loader
from paca_lightning.tasks.data.stream import DocumentStream, Position, StreamedBatch


class StreamLoader:
    """Iterates over a stream without end; every worker of every rank is a reader of its own.

    An epoch of the Trainer goes on where the last one stopped. Positions count the batches handed out, not those that
    workers have prefetched.

    Args:
        stream: The stream.
        batches: Batches that the Trainer takes in an epoch: the length of the loader.
        rank: Rank of this process.
        world_size: Processes that share the rows.
        num_workers: Processes that prepare batches ahead; 0 prepares them in this process.
        trainer: The trainer that trains on the loader.
    """

    def __init__(
        self,
        stream: DocumentStream,
        batches: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        trainer: Trainer | None = None,
    ) -> None:
        self.num_workers = num_workers
        self.stream = stream
        self._batches = batches
        self._rank, self._world_size = rank, world_size
        self._trainer = trainer
        self._positions = [Position()] * max(num_workers, 1)
        self._turn = 0  # the worker whose batch comes next
        self._restored = False

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self._trainer is not None:
            restore_loader_states(self._trainer)
        if self._restored and self._trainer is not None:
            self._restored = False
            # Lightning resumes an epoch that `max_steps` ended, even if no batch of it is left (its issue 19617).
            if self._trainer.fit_loop.batch_idx + 1 >= self._trainer.num_training_batches:
                return
        readers = _Readers(self.stream, self._positions, self._turn, self._rank, self._world_size)
        batches = DataLoader(
            readers,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            timeout=loader.WORKER_TIMEOUT if self.num_workers else 0,
            pin_memory=torch.cuda.is_available(),
            # Without a generator, DataLoader draws the workers' seed from the global random state.
            generator=torch.Generator().manual_seed(self.stream.seed),
        )
        for streamed in batches:
            if isinstance(streamed, PaCAError):
                raise streamed
            if streamed.dropped:
                warnings.warn(
                    f"{len(streamed.dropped):,} bad rows dropped, the first: {streamed.dropped[0]}", stacklevel=2
                )
            self._positions[self._turn] = Position(*streamed.position)
            self._turn = (self._turn + 1) % len(self._positions)
            yield streamed.batch

    def state_dict(self) -> dict[str, Any]:
        """The positions of the readers of all ranks, and what the order depends on; equal on all ranks.

        To be called on all ranks: they stand at different places, and a checkpoint has the state of one.
        """
        here = torch.tensor([[self._rank, *position] for position in self._positions])
        if self._world_size > 1 and self._trainer is not None:
            strategy = self._trainer.strategy
            here = strategy.all_gather(here.to(strategy.root_device)).reshape(-1, 4).cpu()
        positions: dict[int, list[list[int]]] = {}
        for rank, *position in here.tolist():
            if len(positions.setdefault(rank, [])) < len(self._positions):  # ranks of a model in parts read the same
                positions[rank].append(position)
        return {"positions": positions, "turn": self._turn, "order": self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a saved position.

        Raises:
            PaCAError: The order has changed: other data, seed, batch size, workers or world size.
        """
        saved, here = state_dict["order"], self._identity()
        if saved != here:
            changed = ", ".join(f"{key} {saved.get(key)} -> {here[key]}" for key in here if saved.get(key) != here[key])
            raise PaCAError(
                f"the stream of training data cannot be taken up again, as these have changed: {changed}. Restore them."
            )
        self._positions = [Position(*position) for position in state_dict["positions"][self._rank]]
        self._turn = state_dict["turn"]
        self._restored = True

    def _identity(self) -> dict[str, Any]:
        readers = {"streaming": True, "world_size": self._world_size, "num_workers": self.num_workers}
        return readers | self.stream.identity()


class _Readers(IterableDataset[StreamedBatch | PaCAError]):
    """What each worker reads; torch takes a batch of every worker in turn, from worker 0 on."""

    def __init__(
        self, stream: DocumentStream, positions: list[Position], turn: int, rank: int, world_size: int
    ) -> None:
        self._stream, self._positions, self._turn = stream, list(positions), turn
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[StreamedBatch | PaCAError]:
        workers, info = len(self._positions), get_worker_info()
        worker = (self._turn + (info.id if info is not None else 0)) % workers
        reader, readers = self._rank * workers + worker, self._world_size * workers
        try:
            yield from self._stream.batches(reader, readers, self._positions[worker])
        except PaCAError as error:  # raised by the loader: from here it would come with torch's traceback
            yield error


def _as_it_is(streamed: Any) -> Any:
    return streamed
