"""DiLoCo on torchft: replicas equal plain references, end with the same bits, and do without each other."""

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from paca_lightning import PaCAConfig, PaCAError, PaCAStrategy, apply_paca, attach, paca_layers, write_columns
from tests.artefacts import logged
from tests.processes import HANG
from tests.tiny import tiny_llama

pytest.importorskip("torchft")

from paca_lightning.strategies import DiLoCoStrategy
from paca_lightning.strategies.diloco.address import own_address
from paca_lightning.strategies.diloco.fragments import split
from paca_lightning.strategies.diloco.group import refusal

ROWS = torch.randint(3, 380, (64, 12), generator=torch.Generator().manual_seed(0))
BATCH = 8  # of all replicas
TIMEOUT = timedelta(seconds=HANG)


class Chat(LightningModule):
    """A tiny Llama on rows of equal length, in order; ``by_step`` finds its place again, as no plain loader does."""

    def __init__(self, optimizer: str = "SGD", lr: float = 0.5, by_step: bool = False) -> None:
        super().__init__()
        self.model = tiny_llama()
        self.optimizer, self.lr, self.by_step = optimizer, lr, by_step

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = getattr(torch.optim, self.optimizer)(trained, lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.by_step:
            step, ranks = self.trainer.global_step, self.trainer.distributed_sampler_kwargs
            batch = ROWS[step * BATCH : (step + 1) * BATCH][ranks["rank"] :: ranks["num_replicas"]]
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    def train_dataloader(self) -> DataLoader[Tensor]:
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = DistributedSampler(ROWS, **ranks, shuffle=False)  # Lightning's own would shuffle
        return DataLoader(ROWS, batch_size=BATCH // ranks["num_replicas"], sampler=sampler)


def trainer(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    saves = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    settings = {"enable_checkpointing": saves, "logger": False} | settings
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[PaCAStrategy(PaCAConfig(r=4)), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        **settings,
    )


def deltas(module: torch.nn.Module) -> list[Tensor]:
    return [layer.paca_delta.detach().clone() for _, layer in paca_layers(module)]


def replica(
    number: int,
    root: Path,
    lighthouse: str,
    strategy: dict[str, Any],
    module: dict[str, Any],
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> None:
    """Train one replica and save its deltas; runs in a process of its own."""
    torch.set_num_threads(1)
    strategy = {"replicas": 2, "host": "127.0.0.1", "timeout": TIMEOUT} | strategy
    model = Chat(**module)
    run = trainer(
        root, *callbacks, strategy=DiLoCoStrategy(replica=number, lighthouse=lighthouse, **strategy), **settings
    )
    run.fit(model, ckpt_path=ckpt_path)
    for _, layer in paca_layers(model):
        torch.testing.assert_close(
            layer.weight[:, layer.paca_indices], layer.paca_base_columns + layer.scaling * layer.paca_delta
        )
    torch.save({"deltas": deltas(model), "steps": run.global_step}, root / f"{number}.pt")


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Starts a replica in a process; none outlives the test."""
    processes = []

    def start_one(*arguments: Any, **settings: Any) -> Any:
        process = get_context("forkserver").Process(target=replica, args=arguments, kwargs=settings)
        process.start()
        processes.append(process)
        return process

    yield start_one
    for process in processes:
        process.kill()
        process.join()


def ended(root: Path, *processes: Any, numbers: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    for process in processes:
        process.join(HANG)
        assert process.exitcode == 0
    return [torch.load(root / f"{number}.pt") for number in numbers]


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.distributed
def test_exchange_of_each_plain_step_is_data_parallelism(
    start: Callable[..., Any], lighthouse: Callable[[int], str], tmp_path: Path
) -> None:
    address = lighthouse(2)
    each_step = {"sync_every": 1, "outer_lr": 1.0, "outer_momentum": 0.0}
    first, second = ended(
        tmp_path, *(start(n, tmp_path, address, each_step, {"optimizer": "SGD"}, max_steps=4) for n in range(2))
    )
    whole = Chat()
    trainer(tmp_path, max_steps=4).fit(whole)
    assert same_bits(first["deltas"], second["deltas"])
    for delta, plain in zip(first["deltas"], deltas(whole), strict=True):
        assert plain.abs().max() > 1e-4
        torch.testing.assert_close(delta, plain, rtol=1e-4, atol=1e-7)  # sums in another order


@pytest.mark.distributed
def test_run_equals_a_plain_loop_of_the_paper_and_resumes_between_two_exchanges(
    start: Callable[..., Any], lighthouse: Callable[[int], str], tmp_path: Path
) -> None:
    """Six steps, an exchange every four and at the end; the checkpoint lies behind step five."""
    address, settings, adam = lighthouse(2), {"sync_every": 4}, {"optimizer": "AdamW", "lr": 1e-2, "by_step": True}
    saving = [ModelCheckpoint(tmp_path / str(n), "{step}", every_n_train_steps=5) for n in range(2)]
    first, second = ended(
        tmp_path, *(start(n, tmp_path, address, settings, adam, saving[n], max_steps=6) for n in range(2))
    )
    assert same_bits(first["deltas"], second["deltas"])
    for delta, plain in zip(first["deltas"], plain_diloco(steps=6, exchanges=(4, 6)), strict=True):
        torch.testing.assert_close(delta, plain, rtol=1e-5, atol=1e-8)

    address, saved = lighthouse(2), [tmp_path / str(n) / "step=5.ckpt" for n in range(2)]
    resumed, _ = ended(
        tmp_path, *(start(n, tmp_path, address, settings, adam, ckpt_path=saved[n], max_steps=6) for n in range(2))
    )
    assert same_bits(resumed["deltas"], first["deltas"])


@pytest.mark.distributed
def test_compressed_fragments_end_with_the_same_bits_and_resume_between_two_exchanges(
    start: Callable[..., Any], lighthouse: Callable[[int], str], tmp_path: Path
) -> None:
    """Exchanges of two halves behind steps 2, 4 and 6, where the run ends with both."""
    settings, adam = {"sync_every": 4, "fragments": 2, "compression": "int8"}, {"optimizer": "AdamW", "by_step": True}
    address, saving = (
        lighthouse(2),
        [ModelCheckpoint(tmp_path / str(n), "{step}", every_n_train_steps=5) for n in (0, 1)],
    )
    loggers = [CSVLogger(tmp_path, "logs", str(n)) for n in range(2)]
    runs = (start(n, tmp_path, address, settings, adam, saving[n], max_steps=6, logger=loggers[n]) for n in range(2))
    first, second = ended(tmp_path, *runs)
    assert same_bits(first["deltas"], second["deltas"])
    version = tmp_path / "logs" / "1"
    sent, total = (logged(version, f"diloco/{name}") for name in ("bytes_sent", "bytes_sent_total"))
    assert logged(version, "diloco/replicas") == [2.0] * 4
    assert [sum(sent[: n + 1]) for n in range(4)] == total
    assert sum(delta.numel() for delta in first["deltas"]) * 2 < total[-1]  # bytes and scales

    address, saved = lighthouse(2), [tmp_path / str(n) / "step=5.ckpt" for n in range(2)]
    resumed, other = ended(
        tmp_path, *(start(n, tmp_path, address, settings, adam, ckpt_path=saved[n], max_steps=6) for n in range(2))
    )
    assert same_bits(resumed["deltas"], first["deltas"])
    assert same_bits(other["deltas"], first["deltas"])


def plain_diloco(steps: int, exchanges: tuple[int, ...]) -> list[Tensor]:
    """Algorithm 1 of arXiv 2311.08105 on two models in one process."""
    models = [Chat("AdamW", 1e-2) for _ in range(2)]
    for model in models:
        apply_paca(model, PaCAConfig(r=4))
    shared = [delta.clone().requires_grad_() for delta in deltas(models[0])]
    outer = torch.optim.SGD(shared, lr=0.7, momentum=0.9, nesterov=True)
    inner = [model.configure_optimizers()[0][0] for model in models]
    for model, optimizer in zip(models, inner, strict=True):
        attach(optimizer, model)
    for step in range(steps):
        for k, (model, optimizer) in enumerate(zip(models, inner, strict=True)):
            optimizer.zero_grad()
            model.training_step(ROWS[step * BATCH : (step + 1) * BATCH][k::2], step).backward()
            optimizer.step()
        if step + 1 in exchanges:
            for at, *local in zip(shared, *map(deltas, models), strict=True):
                at.grad = sum(at.detach() - delta for delta in local) / 2
            outer.step()
            for model in models:
                with torch.no_grad():
                    for (_, layer), at in zip(paca_layers(model), shared, strict=True):
                        layer.paca_delta.copy_(at)
                write_columns(model)
    return deltas(models[0])


class Dies(Callback):
    """Ends the process as SIGKILL does, behind a step or in an exchange.

    Sets an event when it begins to train: from then on, the lighthouse waits for it before each exchange.
    """

    def __init__(self, step: int, in_exchange: bool = False, begun: Any = None) -> None:
        self.step, self.in_exchange, self.begun = step, in_exchange, begun

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.begun is not None:
            self.begun.set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self.step and self.in_exchange:
            trainer.strategy.outer.group.allreduce = lambda *_: os._exit(9)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            os._exit(9)


@pytest.mark.distributed
def test_replica_that_dies_and_is_started_anew_ends_with_the_same_bits(
    start: Callable[..., Any], lighthouse: Callable[[int], str], tmp_path: Path
) -> None:
    address, settings, adam = lighthouse(2), {"sync_every": 2}, {"optimizer": "AdamW", "lr": 1e-2}
    lives = start(0, tmp_path, address, settings, adam, max_steps=8)
    dies = start(1, tmp_path, address, settings, adam, Dies(3), max_steps=8)
    dies.join(HANG)
    assert dies.exitcode == 9
    again = start(1, tmp_path, address, settings, adam, max_steps=8)
    first, second = ended(tmp_path, lives, again)
    assert same_bits(first["deltas"], second["deltas"])
    assert first["steps"] == second["steps"] == 8


@pytest.mark.distributed
def test_others_go_on_when_a_replica_dies_in_an_exchange(
    start: Callable[..., Any], lighthouse: Callable[[int], str], tmp_path: Path
) -> None:
    address, adam = lighthouse(2), {"optimizer": "AdamW", "lr": 1e-2}
    settings = {"sync_every": 2, "replicas": 3, "timeout": timedelta(seconds=20)}
    begun = get_context("forkserver").Event()
    dies = start(2, tmp_path, address, settings, adam, Dies(4, in_exchange=True, begun=begun), max_steps=8)
    assert begun.wait(HANG)  # or the two others might be past its step before it comes
    first, second = (start(n, tmp_path, address, settings, adam, max_steps=8) for n in range(2))
    one, two = ended(tmp_path, first, second)
    dies.join(HANG)
    assert dies.exitcode == 9
    assert same_bits(one["deltas"], two["deltas"])


@pytest.mark.parametrize(
    ("here", "others", "stops"),
    [
        ([7, 1, 0], [[7, 1, 0]], False),
        ([7, 1, 0], [[8, 1, 0]], True),  # nobody knows who is right
        ([8, 1, 0], [[7, 1, 3]], True),  # who comes late is wrong
        ([7, 1, 3], [[8, 1, 0]], False),
        ([7, 1, 0], [[7, 1, 0], [8, 1, 0]], False),  # most are right
        ([7, 2, 3], [[7, 1, 3]], True),
        ([7, 2, 3], [[7, 1, 0]], False),  # will take over the parameters
    ],
)
def test_replicas_that_train_something_else_are_refused(here: list[int], others: list[list[int]], stops: bool) -> None:
    assert bool(refusal(here, [*others, here])) == stops


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replica": 2}, "is none of the 2 replicas"),
        ({"sync_every": 10, "fragments": 3}, "divides sync_every"),
        ({"outer_lr": 0.0}, "outer_lr"),
        ({"compression": "fp4"}, "'fp4' is none of none, bf16, int8, top_k"),
        ({"top_k": 0.0}, "top_k=0.0"),
        ({"min_replicas": 3}, "min_replicas=3"),
        ({"replicas": None}, "NUM_REPLICA_GROUPS"),
        ({"lighthouse": None}, "TORCHFT_LIGHTHOUSE"),
        ({"lighthouse": "10.0.0.1:29510"}, r"lighthouse='10.0.0.1:29510' has to be .*http://HOST:29510"),
        ({"lighthouse": "http://10.0.0.1"}, "has to be the address of a lighthouse"),
    ],
)
def test_mistakes_in_settings(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("NUM_REPLICA_GROUPS", "TORCHFT_LIGHTHOUSE"):
        monkeypatch.delenv(variable, raising=False)
    settings = {"replicas": 2, "replica": 0, "lighthouse": "http://127.0.0.1:1"} | settings
    with pytest.raises(PaCAError, match=message):
        trainer(tmp_path, max_steps=4, strategy=DiLoCoStrategy(**settings)).fit(Chat())


def test_lighthouse_that_is_not_there_and_a_run_that_never_exchanges(
    lighthouse: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paca_lightning.strategies.diloco.outer.CONNECT_TIMEOUT", timedelta(milliseconds=100))
    nowhere = DiLoCoStrategy(2, 0, "http://127.0.0.1:1", host="127.0.0.1")
    with pytest.raises(PaCAError, match=r"no lighthouse answers at http://127.0.0.1:1"):
        trainer(tmp_path, max_steps=4, strategy=nowhere).fit(Chat())
    monkeypatch.undo()
    short = DiLoCoStrategy(2, 0, lighthouse(2), host="127.0.0.1", sync_every=5)
    with pytest.raises(PaCAError, match="4 steps and sync_every=5"):
        trainer(tmp_path, max_steps=4, strategy=short).fit(Chat())


def test_a_replica_is_reached_on_the_network_of_the_lighthouse() -> None:
    assert own_address("http://127.0.0.1:29510") == "127.0.0.1"
    assert own_address("http://localhost:29510") == "127.0.0.1"
    with pytest.raises(
        PaCAError, match=r"the lighthouse's host is not found: .*nowhere.invalid.*set the strategy's host"
    ):
        own_address("http://nowhere.invalid:29510")


def test_fragments_are_of_about_equal_size() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (5, 1, 1, 1, 4, 4)]
    assert [[p.numel() for p in part] for part in split(parameters, 3)] == [[5, 1], [1, 1, 4], [4]]
    assert [len(part) for part in split(deepcopy(parameters), 6)] == [1] * 6
    with pytest.raises(PaCAError, match="fragments=7"):
        split(parameters, 7)
