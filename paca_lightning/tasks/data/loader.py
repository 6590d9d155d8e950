"""A data loader that knows where it is, and goes on from there."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.lightning import restore_loader_states
from paca_lightning.tasks.data.sampler import BatchOrder


class ResumableLoader:
    """Iterates over an epoch's batches, and resumes in the middle of one.

    Lightning saves the state of every training loader that has `state_dict`, and restores it before the loader's
    first batch. A position counts batches handed out, whatever the workers have prefetched, so it is that of the step
    just finished.

    This is deliberately no `torch.utils.data.DataLoader`: Lightning leaves such loaders alone, while it would rebuild a
    DataLoader around a `DistributedSampler` and so share the rows a second time. The global random state is never used.

    Args:
        dataset: Its `__getitems__` gets what the order yields, and returns what `collate_fn` takes.
        order: The batches of each epoch, already shared over the ranks.
        collate_fn: Makes a batch.
        num_workers: Processes that prepare batches ahead; 0 does it in this process.
        trainer: The trainer that trains on the loader. Its progress tells where a restored epoch ends.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        order: BatchOrder,
        collate_fn: Callable[[Any], Any],
        num_workers: int = 0,
        trainer: Trainer | None = None,
    ) -> None:
        # `sampler` is where Lightning looks for `set_epoch`. There must be no attribute `dataset`: with
        # `overfit_batches` Lightning would try to rebuild the loader around it.
        self.sampler = self.batch_sampler = order
        self.num_workers = num_workers
        self._dataset = dataset
        self._collate_fn = collate_fn
        self._trainer = trainer
        self._epoch = order.epoch
        self._position = 0
        self._restored = False
        self._lag = 0  # epochs that Lightning's count is ahead of this loader's

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        # Lightning creates the iterator first and sets the epoch afterwards: nothing may be decided before the first
        # batch.
        if self._trainer is not None:
            # Lightning (2.6) restores loaders as it makes them: before it reads the checkpoint, if a module asked for
            # the length of the run in configure_optimizers. What waits since then is restored here.
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

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, its batches handed out so far, and what their order depends on; equal on all ranks."""
        return {"epoch": self._epoch, "position": self._position, "order": self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a saved loader stood.

        Raises:
            PaCAError: The loader stood in mid-epoch, and its order was another: other data, seed, batch size or world
                size.
        """
        saved, here = state_dict["order"], self._identity()
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
        """Settle where a restored loader goes on; true if the trainer, or else the position, is past the epoch's end.

        A run that `max_steps` stopped has counted its last epoch as done, complete or not, and Lightning goes on in it
        under the next number, even if not a batch of it is left (Lightning issue 19617). So its count is only good for
        telling later epochs apart, and it is the loader's own that says which one this is.
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
            pin_memory=torch.cuda.is_available(),
            # Else the seed of the workers is drawn from the global random state.
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
