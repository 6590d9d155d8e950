"""Training sharded by FSDP2Strategy equals training on one process, and resumes on any number of ranks."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from paca_lightning import PaCAConfig, PaCAError, PaCAStrategy, apply_paca
from paca_lightning.activation_checkpointing.blocks import checkpoint_blocks, find_blocks
from paca_lightning.strategies.fsdp2.sharding import ShardingOptions, shard
from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy
from tests.distributed_launch import launch
from tests.distributed_training import (
    Plain,
    Run,
    assert_equal_runs,
    on_two_ranks,
    resume_all,
    train,
    train_all,
    train_plain,
    train_until_death,
)
from tests.tiny import tiny_llama

NF4 = PaCAConfig(r=4, alpha=8, quantize="nf4")
NORMS = PaCAConfig(r=4, alpha=8, train_norms=True, norms_lr=0.25)
RUNS = {
    "dense": Run(strategy={}),
    "in __init__": Run(strategy={}, module={"in_init": True}),
    "tied embeddings": Run(strategy={}, module={"tie_word_embeddings": True}),
    "accumulation": Run(strategy={}, trainer={"accumulate_grad_batches": 2}),
    "clipping": Run(strategy={}, trainer={"gradient_clip_val": 0.01}),
    "bf16-mixed": Run(strategy={}, trainer={"precision": "bf16-mixed"}),
    "bf16-true": Run(strategy={}, trainer={"precision": "bf16-true"}),
    "activation checkpointing": Run(strategy={"activation_checkpointing": True}),
    "selective checkpointing": Run(strategy={"activation_checkpointing": "selective"}),
    "block inputs offloaded": Run(strategy={"activation_checkpointing": "offload"}),
    "parameters offloaded": Run(strategy={"cpu_offload": True}),
    "kept gathered": Run(strategy={"reshard_after_forward": False}),
    "narrow modules trained whole": Run(
        strategy={},
        module={"dtype": torch.bfloat16},
        config=PaCAConfig(r=4, modules_to_save=["lm_head", "input_layernorm"]),
    ),
    "columns with steps of their own": Run(strategy={}, config=PaCAConfig(r=4, alpha=8, column_steps="input_rms")),
    "norms trained along, bf16-true": Run(
        strategy={}, config=PaCAConfig(r=4, train_norms=True), trainer={"precision": "bf16-true"}
    ),
    "norms at a rate of their own": Run(strategy={}, config=NORMS),
    "NF4": Run(strategy={}, config=NF4),
    "NF4, accumulation, clipping": Run(
        strategy={}, config=NF4, trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.01}
    ),
    "NF4, bf16-mixed": Run(strategy={}, config=NF4, trainer={"precision": "bf16-mixed"}),
    "NF4, selective checkpointing": Run(strategy={"activation_checkpointing": "selective"}, config=NF4),
}
PLAIN = Run(strategy={}, steps=8, config=PaCAConfig(r=3, target_modules=r"layers\..*"))


def on_one_process(run: Run, ranks: int) -> Run:
    """The run on one process that a sharded run must equal. In bf16 it takes the same micro-batches as the ranks."""
    narrow = "precision" in run.trainer or "dtype" in run.module
    return dataclasses.replace(run, strategy=None, ranks_of_one=ranks if narrow else 1)


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, Any]:
    return launch(on_two_ranks, 2, RUNS, PLAIN)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one_process(two_ranks: dict[str, Any], name: str) -> None:
    assert_equal_runs(two_ranks["runs"][name], train(on_one_process(RUNS[name], ranks=2)))


@pytest.mark.distributed
def test_a_module_without_blocks_may_call_its_forward_in_its_steps(two_ranks: dict[str, Any]) -> None:
    one = train_plain(dataclasses.replace(PLAIN, strategy=None))
    assert_equal_runs(two_ranks["plain"], one)
    assert one["changed"] > 0.01
    assert two_ranks["plain"]["changed"] == pytest.approx(one["changed"], rel=0.5)  # of each rank's own batch


@pytest.mark.distributed
def test_write_back_is_local_and_accumulation_reduces_once_per_step(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["communication"] == {"reductions": [0, 2, 0, 2], "in write-back": 0}


@pytest.mark.distributed
def test_a_sharded_module_can_be_used_in_further_runs(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["again"] == (4, 2)


@pytest.mark.distributed
def test_all_ranks_refuse_to_save_if_one_has_too_little_space(two_ranks: dict[str, Any]) -> None:
    assert "does not fit on the disk of '/tmp/never-written.ckpt'" in two_ranks["full disk"]


FOUR = {
    "dense": Run(strategy={}),
    "copies of two shards": Run(strategy={"shard_size": 2}),
    "columns with steps of their own": Run(strategy={}, config=PaCAConfig(r=4, alpha=8, column_steps="input_rms")),
    "NF4": Run(strategy={}, config=NF4),
    "NF4, bf16-mixed": Run(strategy={}, config=NF4, trainer={"precision": "bf16-mixed"}),
    "NF4, selective checkpointing": Run(strategy={"activation_checkpointing": "selective"}, config=NF4),
}
FORMATS = {"directory": True, "file": False}
SAVED = {name: (Run().config, sharded) for name, sharded in FORMATS.items()} | {
    "NF4 directory": (NF4, True),
    "norms directory": (NORMS, True),
    "norms file": (NORMS, False),
}


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Complete runs on four ranks, and runs that stop half-way and save in both formats."""
    directory = tmp_path_factory.mktemp("checkpoints")
    half = {
        name: Run(
            steps=5,
            config=config,
            strategy={"save_distributed_checkpoint": sharded},
            module={"by_step": True},
            save=directory / f"{name}.ckpt",
        )
        for name, (config, sharded) in SAVED.items()
    }
    whole = {
        f"whole {kind}": Run(strategy={}, config=config, module={"by_step": True})
        for kind, config in (("dense", Run().config), ("NF4", NF4), ("norms", NORMS))
    }
    return {"checkpoints": directory, **launch(train_all, 4, FOUR | half | whole)[0]}


@pytest.mark.distributed
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one_process(four_ranks: dict[str, Any], name: str) -> None:
    assert_equal_runs(four_ranks[name], train(on_one_process(FOUR[name], ranks=4)))


@pytest.mark.distributed
def test_checkpoints_hold_only_what_is_trained(four_ranks: dict[str, Any]) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    saved = FileSystemReader(four_ranks["checkpoints"] / "directory.ckpt").read_metadata().state_dict_metadata
    file = torch.load(four_ranks["checkpoints"] / "file.ckpt", weights_only=True)
    names = {name.removeprefix("state_dict.") for name in saved if name.startswith("state_dict.")}
    assert names == set(file["state_dict"])
    assert {name.rpartition(".")[2] for name in names} == {"paca_delta", "paca_indices"}


@pytest.mark.distributed
def test_resume_on_two_ranks(four_ranks: dict[str, Any]) -> None:
    # Another seed draws other columns: those of the checkpoint must replace them.
    other_columns = PaCAConfig(r=4, alpha=8, seed=1)
    runs = {name: resumed(four_ranks, name, strategy={}, config=other_columns) for name in FORMATS}
    runs["NF4 directory"] = resumed(four_ranks, "NF4 directory", strategy={}, config=NF4)
    for name in ("norms directory", "norms file"):
        runs[name] = resumed(four_ranks, name, strategy={}, config=NORMS)
    refused = {name: dataclasses.replace(runs[name], config=PaCAConfig(r=8)) for name in FORMATS}
    refused["nowhere"] = dataclasses.replace(runs["file"], resume=Path("/tmp/nowhere.ckpt"))
    results = launch(resume_all, 2, runs, refused)[0]
    for name in runs:
        assert_equal_runs(results[name], latter_half(four_ranks, name))
    assert "does not fit this model" in results["refused"]["directory"]
    assert "has shape (64, 4) in the checkpoint and (64, 8) in the model" in results["refused"]["file"]
    assert "'/tmp/nowhere.ckpt' is neither a checkpoint file nor a directory" in results["refused"]["nowhere"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", FORMATS)
def test_resume_sharded_on_one_rank(four_ranks: dict[str, Any], name: str) -> None:
    result = launch(train, 1, resumed(four_ranks, name, strategy={}))[0]
    assert_equal_runs(result, latter_half(four_ranks, name))


@pytest.mark.distributed
def test_resume_a_file_on_a_single_device_and_back(four_ranks: dict[str, Any], tmp_path: Path) -> None:
    single = resumed(four_ranks, "file", save=tmp_path / "single.ckpt")
    assert_equal_runs(train(single), latter_half(four_ranks, "file"))

    back = dataclasses.replace(single, steps=15, resume=single.save, save=None)
    assert_equal_runs(launch(train, 2, dataclasses.replace(back, strategy={}))[0], train(back))


def resumed(four_ranks: dict[str, Any], name: str, **changes: Any) -> Run:
    checkpoint = four_ranks["checkpoints"] / f"{name}.ckpt"
    return dataclasses.replace(Run(module={"by_step": True}), resume=checkpoint, **changes)


def latter_half(four_ranks: dict[str, Any], name: str) -> dict[str, Any]:
    kind = next((kind for kind in ("NF4", "norms") if name.startswith(kind)), "dense")
    whole: dict[str, Any] = four_ranks[f"whole {kind}"]
    return whole | {"losses": whole["losses"][5:]}


@pytest.mark.distributed
def test_if_a_rank_dies_the_other_ends_and_a_run_resumes_from_the_last_checkpoint(tmp_path: Path) -> None:
    run = Run(strategy={}, steps=9, save=tmp_path / "last.ckpt")
    with pytest.raises(AssertionError, match=r"(?s)exit codes \[1, 9\].*rank 0: .*[Cc]onnection"):
        launch(train_until_death, 2, run, 3)
    run = dataclasses.replace(run, steps=5, resume=run.save, save=None)
    assert len(launch(train, 2, run)[0]["losses"]) == 2


def test_registered_by_name() -> None:
    assert isinstance(StrategyRegistry.get("paca_fsdp2"), FSDP2Strategy)


def test_blocks_are_declared_by_hugging_face_or_given_by_name() -> None:
    model = tiny_llama()
    assert find_blocks(model) == list(model.model.layers)
    assert find_blocks(model, ["LlamaMLP"]) == [layer.mlp for layer in model.model.layers]
    assert find_blocks(nn.Linear(2, 2)) == []
    with pytest.raises(PaCAError, match=r"'LlamaDecoder'.* Did you mean 'LlamaDecoderLayer'"):
        find_blocks(model, ["LlamaDecoder"])


def test_checkpointed_blocks_give_the_same_gradients_with_a_cache() -> None:
    ids = torch.arange(32).view(2, 16)
    gradients = []
    for offload in (None, False, True):
        model = tiny_llama()
        if offload is not None:
            checkpoint_blocks(find_blocks(model), offload=offload)
        model(input_ids=ids, labels=ids, use_cache=True).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


class Shared(nn.Module):
    """Two blocks that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
        self.second[0].weight = self.first[0].weight


def scaled() -> nn.Module:
    model = nn.Linear(4, 4)
    model.scale = nn.Parameter(torch.ones(()))
    return model


def quantized_by_bitsandbytes() -> nn.Module:
    model = nn.Linear(4, 4)
    model.weight.quant_state = object()
    return model


def converted_gpt2() -> nn.Module:
    model = nn.Sequential(Conv1D(8, 4))
    apply_paca(model, PaCAConfig(r=2))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Shared(), "'first.0.weight' is shared by a Sequential and a Sequential"),
        (scaled(), r"'scale' is a scalar, which FSDP2 cannot shard. Make it a tensor of shape \(1,\)"),
        (quantized_by_bitsandbytes(), r"'weight' is quantized by bitsandbytes.*quantize='nf4'"),
        (converted_gpt2(), r"The weight of '0' \(Hugging Face's Conv1D\) is transposed"),
    ],
)
def test_a_model_that_cannot_be_sharded_is_refused_first(model: nn.Module, message: str) -> None:
    blocks = find_blocks(model, ["Sequential"]) if isinstance(model, Shared) else []
    with pytest.raises(PaCAError, match=message):
        shard(model, None, blocks, ShardingOptions())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shard_size": 2}, r"shard_size=2 does not divide 1 ranks.*Use one of \[1\]"),
        ({"reshard_after_forward": 3}, "reshard_after_forward=3 does not divide 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(arguments: dict[str, Any], message: str) -> None:
    trainer = Trainer(accelerator="cpu", devices=1, strategy=FSDP2Strategy(**arguments), logger=False, max_steps=1)
    with pytest.raises(PaCAError, match=message):
        trainer.fit(Plain())


class Described(LightningModule):
    """A module whose hyperparameters are an object, which a checkpoint has to pickle."""

    def __init__(self, config: PaCAConfig) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def described_run(directory: Path) -> dict[str, Any]:
    """Evaluate and resume the file of one device on a sharded model, then resume a directory."""
    config = PaCAConfig(r=2)
    data = DataLoader(torch.ones(8, 8), batch_size=4)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    def trainer(**arguments: Any) -> Trainer:
        paca = PaCAStrategy(config)
        return Trainer(accelerator="cpu", devices=1, callbacks=[paca], enable_checkpointing=False, **quiet, **arguments)

    def fresh() -> Described:
        torch.manual_seed(0)
        return Described(config)

    first, module = trainer(max_steps=1), fresh()
    first.fit(module, data)
    first.save_checkpoint(directory / "one.ckpt")
    (expected,) = trainer().validate(module, data, verbose=False)

    sharded = {"strategy": "paca_fsdp2"}
    with pytest.raises(PaCAError, match=r"an object of paca_lightning\.core\.config\.PaCAConfig .*add_safe_globals"):
        trainer(**sharded).validate(fresh(), data, directory / "one.ckpt", verbose=False)
    with torch.serialization.safe_globals([PaCAConfig]):
        (found,) = trainer(**sharded).validate(fresh(), data, directory / "one.ckpt", verbose=False)
        second = trainer(max_steps=2, **sharded)
        second.fit(fresh(), data, ckpt_path=directory / "one.ckpt")
        second.save_checkpoint(directory / "two.ckpt")
        third = trainer(max_steps=3, **sharded)
        third.fit(fresh(), data, ckpt_path=directory / "two.ckpt")
    return {"expected": expected["loss"], "found": found["loss"], "steps": third.global_step}


@pytest.mark.distributed
def test_a_file_is_evaluated_and_its_objects_are_unpickled_if_allowed(tmp_path: Path) -> None:
    result = launch(described_run, 1, tmp_path)[0]
    assert result["found"] == result["expected"]
    assert result["steps"] == 3
