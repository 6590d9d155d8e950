"""The order of batches, and a loader that goes on exactly where it stood."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.collate import DocumentReader, PadCollator
from paca_lightning.tasks.data.loader import ResumableLoader
from paca_lightning.tasks.data.sampler import Batch, BatchOrder
from paca_lightning.tasks.instruction import InstructionDataModule
from tests.distributed_launch import launch
from tests.tiny import tiny_tokenizer

STEPS_AN_EPOCH = 6


def lengths(documents: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 60, size=documents)


@pytest.mark.parametrize("pack_to", [None, 64])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("documents", "batch_size", "world_size"), [(7, 3, 1), (50, 4, 1), (53, 2, 3), (90, 3, 4), (53, 1, 3), (50, 1, 4)]
)
def test_ranks_share_every_document_once_in_equally_many_batches(
    documents: int, batch_size: int, world_size: int, shuffle: bool, pack_to: int | None
) -> None:
    orders = [
        BatchOrder(lengths(documents), batch_size, shuffle=shuffle, pack_to=pack_to, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    batches = [list(order.batches(epoch=3)) for order in orders]
    assert {len(rank) for rank in batches} == {len(orders[0])}
    flat = [batch for rank in batches for batch in rank]
    own = [batch.documents for batch in flat if not batch.repeated]
    assert sorted(np.concatenate(own)) == list(range(documents))
    rows = [len(batch.per_row) for batch in flat]
    assert max(rows) <= batch_size
    assert min(rows) >= max(1, max(rows) - 1)
    for step in zip(*batches, strict=True):  # every step has something to train on
        assert not all(batch.repeated for batch in step)


def test_a_rank_without_a_row_of_its_own_gets_one_that_trains_nothing(data_settings: dict[str, Any]) -> None:
    data = InstructionDataModule(**data_settings | {"batch_size": 1})
    data.setup("fit")
    split = data.splits["train"]
    reader, collate = DocumentReader(split.dataset), PadCollator(pad_token_id=2)
    batches = [
        [collate(reader.__getitems__(batch)) for batch in BatchOrder(split.column("length"), 1, rank=r, world_size=3)]
        for r in range(3)
    ]
    trained = [[int((batch["labels"] != -100).sum()) for batch in rank] for rank in batches]
    assert len(split.dataset) == 11
    assert [len(rank) for rank in trained] == [4, 4, 4]
    assert sum(row == 0 for rank in trained for row in rank) == 1
    assert sum(map(sum, trained)) == split.column("trained_length").sum()


@pytest.mark.parametrize("pack_to", [None, 64])
@pytest.mark.parametrize(("documents", "batch_size", "world_size"), [(7, 3, 1), (53, 2, 3), (53, 1, 3), (50, 1, 4)])
def test_the_tokens_of_a_position_are_those_of_the_batches_of_all_ranks(
    documents: int, batch_size: int, world_size: int, pack_to: int | None
) -> None:
    trained = lengths(documents, seed=1)
    orders = [
        BatchOrder(lengths(documents), batch_size, trained=trained, pack_to=pack_to, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in range(2):
        counted = [
            sum(int(trained[batch.documents].sum()) for batch in step if not batch.repeated)
            for step in zip(*(order.batches(epoch) for order in orders), strict=True)
        ]
        assert [order.trained_tokens(epoch).tolist() for order in orders] == [counted] * world_size
    assert BatchOrder(lengths(documents), batch_size).trained_tokens(0) is None


def listed(order: BatchOrder, epoch: int, start: int = 0) -> list[list[int]]:
    return [batch.documents.tolist() for batch in order.batches(epoch, start)]


@pytest.mark.parametrize("pack_to", [None, 64])
def test_the_order_is_a_function_of_seed_and_epoch(pack_to: int | None) -> None:
    order, again = (BatchOrder(lengths(100), 4, seed=1, pack_to=pack_to) for _ in range(2))
    torch.manual_seed(5)
    first = listed(order, 0)
    np.random.seed(7)
    assert listed(again, 0) == first
    assert listed(again, 0, start=5) == first[5:]
    assert listed(order, 1) != first
    assert listed(BatchOrder(lengths(100), 4, seed=2, pack_to=pack_to), 0) != first


def padding(order: BatchOrder, of: np.ndarray) -> int:
    return sum(int((of[b.documents].max() - of[b.documents]).sum()) for b in order.batches(0))


def test_grouping_by_length_saves_padding_and_puts_the_longest_row_first() -> None:
    of = lengths(1000)
    grouped = BatchOrder(of, 8)
    assert padding(grouped, of) < 0.2 * padding(BatchOrder(of, 8, group_by_length=False), of)
    assert of[next(iter(grouped)).documents].max() == of.max()


@pytest.mark.parametrize(("group_by_length", "pack_to"), [(True, None), (True, 64), (False, 64)])
def test_the_first_batches_of_an_unshuffled_order_are_like_the_rest(group_by_length: bool, pack_to: int | None) -> None:
    """What `limit_val_batches` takes is a fair sample of the split, and always the same one."""
    of = lengths(4000)
    order = BatchOrder(of, 8, shuffle=False, group_by_length=group_by_length, pack_to=pack_to)
    first = [batch.documents for _, batch in zip(range(30), order.batches(0), strict=False)]
    assert of[np.concatenate(first)].mean() == pytest.approx(of.mean(), rel=0.1)
    assert listed(order, 1) == listed(order, 0)
    if pack_to is None:
        assert padding(order, of) < 0.2 * padding(BatchOrder(of, 8, group_by_length=False), of)


def test_an_order_that_nothing_changes_is_that_of_the_documents() -> None:
    order = BatchOrder(lengths(6), 2, shuffle=False, group_by_length=False)
    assert listed(order, 0) == listed(order, 1) == [[0, 1], [2, 3], [4, 5]]


def test_fewer_rows_than_processes_are_refused() -> None:
    with pytest.raises(PaCAError, match="the train split: 3 rows cannot be shared by 4 processes"):
        BatchOrder(lengths(3), 2, world_size=4, name="the train split")


class Echo(torch.utils.data.Dataset[Batch]):
    def __getitems__(self, batch: Batch) -> Batch:
        return batch


def echo(batch: Batch) -> Tensor:
    return torch.from_numpy(batch.documents)


def echo_loader(documents: int = 20, num_workers: int = 0, **order: Any) -> ResumableLoader:
    return ResumableLoader(Echo(), BatchOrder(lengths(documents), 2, **order), echo, num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_plain_loop_resumes_and_leaves_the_random_state_alone(num_workers: int) -> None:
    before = torch.get_rng_state()
    loader = echo_loader(num_workers=num_workers)
    loader.sampler.set_epoch(4)
    batches = iter(loader)
    head = [next(batches).tolist() for _ in range(3)]
    state = loader.state_dict()
    tail = [batch.tolist() for batch in batches]

    resumed = echo_loader(num_workers=num_workers)
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in resumed] == tail
    assert [batch.tolist() for batch in resumed] == head + tail  # the next iteration is a whole epoch again
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_of_another_order_is_refused_in_mid_epoch_only() -> None:
    loader = echo_loader()
    next(iter(loader))
    with pytest.raises(PaCAError, match=r"middle of an epoch.*seed 0 -> 1"):
        echo_loader(seed=1).load_state_dict(loader.state_dict())
    assert len(list(loader)) == len(loader)
    echo_loader(seed=1).load_state_dict(loader.state_dict())


class Bigram(LightningModule):
    """A model small enough that a whole fit takes a fraction of a second. It remembers its batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(384, 384)
        self.batches: list[list[list[int]]] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.batches.append(batch["input_ids"].tolist())
        return self._loss(batch)

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.log("val_loss", self._loss(batch))

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.table(batch["input_ids"][:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.fixture(scope="module")
def data_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("data")
    tiny_tokenizer().save_pretrained(directory / "tokenizer")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a" * i},
                {"role": "assistant", "content": f"It is {i}." * (i % 5 + 1)},
            ]
        }
        for i in range(1, 2 * STEPS_AN_EPOCH)
    ]
    (directory / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "tokenizer": str(directory / "tokenizer"),
        "train": str(directory / "train.jsonl"),
        "cache_dir": str(directory / "cache"),
        "batch_size": 2,
        "seed": 3,
    }


def fit(
    data: dict[str, Any], ckpt_path: Path | None = None, model: Bigram | None = None, **trainer: Any
) -> tuple[Bigram, Trainer]:
    model = model or Bigram()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = {"accelerator": "cpu", "enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet, **trainer}
    runner = Trainer(**trainer)
    runner.fit(model, datamodule=InstructionDataModule(**data), ckpt_path=ckpt_path)
    return model, runner


def assert_same_run(pieces: list[Bigram], whole: Bigram) -> None:
    assert [batch for piece in pieces for batch in piece.batches] == whole.batches
    assert torch.equal(pieces[-1].table.weight, whole.table.weight)


@pytest.mark.slow
@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [4, STEPS_AN_EPOCH, STEPS_AN_EPOCH + 2])
def test_a_run_stopped_by_max_steps_goes_on_as_if_it_had_not_been(
    data_settings: dict[str, Any], tmp_path: Path, stop: int, num_workers: int, validated: bool
) -> None:
    data = data_settings | {"num_workers": num_workers}
    if validated:
        data["validation"] = data["train"]
    whole, _ = fit(data, max_steps=3 * STEPS_AN_EPOCH)
    before, trainer = fit(data, max_steps=stop)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    after, _ = fit(data, tmp_path / "stopped.ckpt", max_steps=3 * STEPS_AN_EPOCH)
    assert len(before.batches) == stop
    assert_same_run([before, after], whole)


class Planned(Bigram):
    """Asks for the length of the run, for which Lightning sets up the loaders before it reads a checkpoint."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches == 2 * STEPS_AN_EPOCH
        return super().configure_optimizers()


@pytest.mark.parametrize("stop", [4, STEPS_AN_EPOCH, STEPS_AN_EPOCH + 2])
def test_a_run_that_knows_its_length_goes_on_as_well(data_settings: dict[str, Any], tmp_path: Path, stop: int) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=stop)
    whole, _ = fit(data_settings, model=Planned(), callbacks=[checkpoint], enable_checkpointing=True, max_epochs=2)
    resumed, _ = fit(data_settings, tmp_path / f"step={stop}.ckpt", model=Planned(), max_epochs=2)
    assert resumed.batches == whole.batches[stop:]
    assert torch.equal(resumed.table.weight, whole.table.weight)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_epochs": 2},
        {"max_steps": 2 * STEPS_AN_EPOCH},
        {"max_epochs": 2, "limit_train_batches": 4},
        {"max_steps": 8, "limit_train_batches": 4},
        {"max_epochs": 2, "accumulate_grad_batches": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("saved", [{"every_n_train_steps": 1}, {"every_n_epochs": 1}], ids=str)
def test_every_checkpoint_of_a_run_leads_to_the_same_end(
    data_settings: dict[str, Any], tmp_path: Path, limits: dict[str, Any], saved: dict[str, Any]
) -> None:
    data = data_settings | {"packing": limits == {"max_epochs": 2}, "max_length": 64}
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **saved)
    whole, _ = fit(data, callbacks=[checkpoint], enable_checkpointing=True, **limits)
    checkpoints = sorted(tmp_path.iterdir())
    assert len(checkpoints) >= 2
    for path in checkpoints:
        resumed, _ = fit(data, path, **limits)
        whole_end = Bigram()
        whole_end.table = whole.table
        whole_end.batches = whole.batches[len(whole.batches) - len(resumed.batches) :]
        if resumed.batches:
            assert_same_run([resumed], whole_end)
        else:
            assert path.name == f"step={trained_steps(whole, limits)}.ckpt"


def trained_steps(model: Bigram, limits: dict[str, Any]) -> int:
    """Optimizer steps of a whole run: an epoch's last batches step even if accumulation is incomplete."""
    accumulate, epoch = limits.get("accumulate_grad_batches", 1), limits.get("limit_train_batches", 0)
    epoch = epoch or len(model.batches) // 2
    return 2 * -(-epoch // accumulate)


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_overfit_batches_sees_the_same_batch_in_every_epoch(data_settings: dict[str, Any]) -> None:
    model, _ = fit(data_settings, max_epochs=3, overfit_batches=1)
    assert len(model.batches) == 3
    assert model.batches[0] == model.batches[1] == model.batches[2]


def batches_of_rank(data: dict[str, Any]) -> list[list[list[int]]]:
    """What this rank of two trains on in an epoch."""
    return fit(data, max_epochs=1, devices=2, strategy="ddp")[0].batches


@pytest.mark.distributed
def test_two_processes_share_the_rows_without_a_second_sampler(data_settings: dict[str, Any]) -> None:
    ranks = launch(batches_of_rank, 2, data_settings)
    alone, _ = fit(data_settings, max_epochs=1)

    def conversations(*batches: list[list[int]]) -> list[list[int]]:
        pad = tiny_tokenizer().pad_token_id
        return sorted([token for token in row if token != pad] for batch in batches for row in batch)

    assert [len(rank) for rank in ranks] == [STEPS_AN_EPOCH // 2] * 2
    assert conversations(*ranks[0], *ranks[1]) == conversations(*alone.batches)
