"""A data loader that saves its position and resumes in the middle of an epoch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.lightning import restore_loader_states
from paca_lightning.tasks.data.sampler import BatchOrder

WORKER_TIMEOUT = 1800.0
"""Seconds to wait for a batch of a worker: as long as ranks wait for each other in torch's collectives over Gloo."""


class ResumableLoader:
    """Iterates over the batches of an epoch, and resumes in the middle of one.

    Lightning saves the state of a training loader that has `state_dict`, and restores it before the loader's first
    batch. The position counts the batches handed out, not those that workers have prefetched.

    Not a `torch.utils.data.DataLoader`: Lightning would rebuild that around a `DistributedSampler`, which would shard
    the rows a second time. The global random state is never used.

    Args:
        dataset: `__getitems__` takes what the order yields, and returns what `collate_fn` takes.
        order: The batches of each epoch for this rank.
        collate_fn: Makes a batch.
        num_workers: Processes that prepare batches ahead; 0 prepares them in this process.
        trainer: The trainer that trains on the loader; its progress tells where a restored epoch ends.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        order: BatchOrder,
        collate_fn: Callable[[Any], Any],
        num_workers: int = 0,
        trainer: Trainer | None = None,
    ) -> None:
        # Lightning looks for `set_epoch` at `sampler`. There must be no attribute `dataset`, or Lightning would rebuild
        # the loader for `overfit_batches`.
        self.sampler = self.batch_sampler = order
        self.num_workers = num_workers
        self._dataset = dataset
        self._collate_fn = collate_fn
        self._trainer = trainer
        self._epoch = order.epoch
        self._position = 0
        self._restored = False
        self._lag = 0  # by how many epochs Lightning's count is ahead of this loader's

    def __len__(self) -> int:
        return len(self.sampler)

    @property
    def epoch(self) -> int:
        """The epoch of the batches that are handed out."""
        return self._epoch

    def __iter__(self) -> Iterator[Any]:
        # Lightning sets the epoch after it creates the iterator, so nothing is decided before the first batch.
        if self._trainer is not None:
            # Lightning 2.6 restores a loader's state when it creates the loader. If configure_optimizers asks for the
            # length of the run, that is before the checkpoint is read, so the state is restored here.
            restore_loader_states(self._trainer)
        if self._restored:
            self._restored = False
            if self._epoch_is_over():
                return
        else:
            self._epoch, self._position = self.sampler.epoch - self._lag, 0
        for batch in self._batches():
            self._position += 1
            yield batch

    def trained_tokens(self, batches: int) -> int | None:
        """Tokens with a loss, on all ranks, in the batch handed out last and in those after it, `batches` in all.

        Batches end with the epoch. None if the order does not know the tokens.
        """
        tokens = self.sampler.trained_tokens(self._epoch)
        return None if tokens is None else int(tokens[self._position - 1 :][:batches].sum())

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the batches handed out, and what their order depends on; equal on all ranks."""
        return {"epoch": self._epoch, "position": self._position, "order": self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a saved position.

        Raises:
            PaCAError: The position is in mid-epoch, and the order has changed: other data, seed, batch size or world
                size.
        """
        saved, here = state_dict["order"], self._identity()
        if "streaming" in saved:
            raise PaCAError("the checkpoint stands in a stream of training data. Set streaming: true to resume it.")
        if 0 < state_dict["position"] < saved["batches"] and saved != here:
            changed = ", ".join(f"{key} {saved.get(key)} -> {here[key]}" for key in here if saved.get(key) != here[key])
            raise PaCAError(
                "the checkpoint was saved in the middle of an epoch, whose batches cannot be taken up again as these "
                f"have changed: {changed}. Restore them, or resume from a checkpoint saved at the end of an epoch."
            )
        self._epoch, self._position = state_dict["epoch"], state_dict["position"]
        self._restored = True
        self.sampler.set_epoch(self._epoch)

    def _epoch_is_over(self) -> bool:
        """Find where a restored loader resumes; True if its epoch has no batches left.

        When `max_steps` stops a run in mid-epoch, Lightning counts that epoch as done and resumes it under the next
        number, even if no batch of it is left (Lightning issue 19617). So the loader keeps its own count, and
        Lightning's only tells later epochs apart.
        """
        if self._trainer is None:
            if self._epoch != self.sampler.epoch:
                self._epoch, self._position = self.sampler.epoch, 0
            return self._position >= len(self)
        in_epoch = self._trainer.fit_loop.batch_idx + 1
        if in_epoch == 0 and self._position > 0:  # the checkpoint was saved at an epoch's last batch
            self._epoch, self._position = self._epoch + 1, 0
        self._lag = self.sampler.epoch - self._epoch
        return in_epoch >= self._trainer.num_training_batches

    def _batches(self) -> Iterator[Any]:
        order = self.sampler
        loader = DataLoader(
            self._dataset,
            batch_sampler=order.batches(self._epoch, self._position),  # type: ignore[arg-type]
            collate_fn=self._collate_fn,
            num_workers=self.num_workers,
            timeout=WORKER_TIMEOUT if self.num_workers else 0,
            pin_memory=torch.cuda.is_available(),
            # Without a generator, DataLoader draws the workers' seed from the global random state.
            generator=torch.Generator().manual_seed(order.seed),
        )
        return iter(loader)

    def _identity(self) -> dict[str, int | bool]:
        order = self.sampler
        return {
            "batches": len(order),
            "documents": len(order.lengths),
            "tokens": int(order.lengths.sum()),
            "batch_size": order.batch_size,
            "world_size": order.world_size,
            "pack_to": order.pack_to or 0,
            "seed": order.seed,
            "shuffle": order.shuffle,
            "group_by_length": order.group_by_length,
        }
