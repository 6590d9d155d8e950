"""Every YAML under configs/ and callbacks/ is found, counted, built and, with a tiny model for a large one, run."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from lightning.pytorch.cli import instantiate_class
from transformers import AutoModelForCausalLM, LlamaConfig

from paca_lightning import PaCAConfig, PaCAError, apply_paca, save_adapter
from paca_lightning.cli import main
from paca_lightning.strategies import HPUFSDP2Strategy, SingleHPUStrategy
from paca_lightning.strategies.hpu.bridge import bridge_installed
from paca_lightning.tools.run_config import lightning_cli
from tests.artefacts import logged, trained_layers
from tests.distributed_launch import launch
from tests.mmlu_files import rows_of, write_csv_folders
from tests.tiny import tiny_llama, tiny_model_directory

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
FRAGMENTS = sorted((ROOT / "callbacks").rglob("*.yaml"))


def names_of(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def settings_of(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return settings


def header_of(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["paca-lightning"])


def test_none_is_overlooked() -> None:
    assert names_of(CONFIGS) == [
        "configs/classify-smollm2.yaml",
        "configs/ddp-powersgd.yaml",
        "configs/debug.yaml",
        "configs/diloco.yaml",
        "configs/dpo-smollm2.yaml",
        "configs/gaudi/mmlu-llama2-7b.yaml",
        "configs/gaudi/oasst1-llama3-8b.yaml",
        "configs/gaudi/oasst1-llama3.1-70b.yaml",
        "configs/mmlu-llama2-7b.yaml",
        "configs/mmlu-smollm2.yaml",
        "configs/my-data.yaml",
        "configs/oasst1-llama3-8b.yaml",
        "configs/oasst1-llama3.1-70b-qpaca-fsdp2.yaml",
        "configs/quickstart.yaml",
        "configs/smollm2-qpaca-fsdp2.yaml",
        "configs/study/conversations.yaml",
        "configs/study/gsm8k.yaml",
        "configs/study/sciq.yaml",
    ]
    assert names_of(FRAGMENTS) == [
        f"callbacks/{name}.yaml"
        for name in (
            "adapter",
            "bottleneck",
            "from_adapter",
            "heldout",
            "history",
            "loreft",
            "mmlu_eval",
            "paca",
            "paca_norms",
            "peft/dora",
            "peft/ia3",
            "peft/layernorm",
            "peft/llama_adapter",
            "peft/p_tuning",
            "peft/prefix_tuning",
            "peft/prompt_tuning",
            "peft/qlora",
            "peft/rslora",
            "peft/shira",
            "peft",
            "projected",
            "qpaca",
            "samples",
            "throughput",
        )
    ]


@pytest.mark.parametrize("path", CONFIGS + FRAGMENTS, ids=names_of(CONFIGS + FRAGMENTS))
def test_header_tells_what_it_is(path: Path) -> None:
    header = header_of(path)
    for word in ("needs", "run", "expect", *(["data"] if path in CONFIGS else [])):
        assert any(line.startswith(f"#   {word} ") for line in header), f"{path.name} does not say: {word}"
    assert f"--config {path.relative_to(ROOT)}" in "\n".join(header)


def paca_of(trainer: dict[str, Any]) -> dict[str, Any]:
    """The settings of PaCA in a config's trainer."""
    named = {entry["class_path"].rpartition(".")[2]: entry for entry in trainer["callbacks"]}
    return named["PaCAStrategy"]["init_args"]["config"]


def test_the_command_line_reaches_what_is_changed_most() -> None:
    for path in CONFIGS:
        last = settings_of(path)["trainer"]["callbacks"][-1]["class_path"].rpartition(".")[2]
        assert last == ("MMLUEvaluation" if "mmlu" in path.name else "PaCAStrategy"), path


@pytest.mark.parametrize("folder", ["configs", "callbacks"])
def test_readme_lists_each(folder: str) -> None:
    readme = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / folder).rglob("*.yaml"):
        assert f"]({path.relative_to(ROOT / folder).as_posix()})" in readme


# What the authors' scripts say: r, alpha, learning rate, schedule, warm-up, epochs, rows a step, seed.
AUTHORS = {
    "configs/mmlu-llama2-7b.yaml": (16, 64, 1e-4, "LinearSchedule", 0.0, 1, 8, 42),
    "configs/oasst1-llama3-8b.yaml": (64, 32, 5e-3, "CosineSchedule", 0.1, 1, 16, 42),
    "configs/oasst1-llama3.1-70b-qpaca-fsdp2.yaml": (64, 32, 5e-3, "CosineSchedule", 0.1, 1, 16, 526),
    "configs/gaudi/mmlu-llama2-7b.yaml": (16, 64, 1e-4, "LinearSchedule", 0.0, 1, 8, 42),
    "configs/gaudi/oasst1-llama3-8b.yaml": (8, 16, 1.8e-3, "CosineSchedule", 0.03, 2, 8, 42),
    "configs/gaudi/oasst1-llama3.1-70b.yaml": (64, 32, 5e-3, "CosineSchedule", 0.1, 1, 16, 526),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_hyperparameters_are_the_authors(name: str) -> None:
    settings = settings_of(ROOT / name)
    trainer, model, data = settings["trainer"], settings["model"]["init_args"], settings["data"]["init_args"]
    paca = paca_of(trainer)
    optimizer, schedule = model["optimizer"], model["lr_scheduler"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert optimizer["init_args"]["weight_decay"] == 0
    assert trainer["precision"] == "bf16-true"
    assert data["max_length"] == 512
    assert settings["seed_everything"] == paca["seed"] == data["seed"]
    assert AUTHORS[name] == (
        paca["r"],
        paca["alpha"],
        optimizer["init_args"]["lr"],
        schedule["class_path"].rpartition(".")[2],
        schedule.get("init_args", {}).get("warmup_ratio", 0.0),
        trainer["max_epochs"],
        trainer["devices"] * data["batch_size"] * trainer.get("accumulate_grad_batches", 1),
        paca["seed"],
    )
    assert any(line.startswith("#   numbers ") for line in header_of(ROOT / name))


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, and the millions of parameters that the authors report as trained."""

    sizes: tuple[int, int, int, int, int]
    trained: float


SHAPES = {  # hidden size, intermediate size, layers, heads, key and value heads
    "configs/mmlu-llama2-7b.yaml": Shape((4096, 11008, 32, 32, 32), 21.8),
    "configs/oasst1-llama3-8b.yaml": Shape((4096, 14336, 32, 32, 8), 88.1),
    "configs/oasst1-llama3.1-70b-qpaca-fsdp2.yaml": Shape((8192, 28672, 80, 64, 8), 430),
}


@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes_train_as_many_parameters_as_reported(name: str) -> None:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(vocab_size=1024, **dict(zip(keys, SHAPES[name].sizes, strict=True)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    paca = paca_of(settings_of(ROOT / name)["trainer"])
    apply_paca(model, PaCAConfig(**paca))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained / 1e6 == pytest.approx(SHAPES[name].trained, rel=0.005)


def build(*arguments: str) -> Any:
    return lightning_cli(list(arguments), run=False)


ON_ANY_MACHINE = [path for path in CONFIGS if path.parent.name != "gaudi"]


@pytest.mark.parametrize("path", ON_ANY_MACHINE, ids=names_of(ON_ANY_MACHINE))
def test_config_builds_a_run(path: Path) -> None:
    named = settings_of(path)
    # As many devices as the config says may not be here.
    cli = build("--config", str(path), "--trainer.accelerator=cpu")
    assert type(cli.model).__name__ == named["model"]["class_path"].rpartition(".")[2]
    assert type(cli.datamodule).__name__ == named["data"]["class_path"].rpartition(".")[2]
    callbacks = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert callbacks >= {entry["class_path"].rpartition(".")[2] for entry in named["trainer"]["callbacks"]}
    strategy = named["trainer"].get("strategy", {"class_path": "SingleDeviceStrategy"})
    assert type(cli.trainer.strategy).__name__ == strategy["class_path"].rpartition(".")[2]


GAUDI = [path for path in CONFIGS if path.parent.name == "gaudi"]


@pytest.mark.skipif(bridge_installed(), reason="the message is for hosts without the Gaudi software")
@pytest.mark.parametrize("path", GAUDI, ids=names_of(GAUDI))
def test_gaudi_config_gets_as_far_as_the_missing_hardware(path: Path) -> None:
    # The Trainer itself cannot be built, as the accelerator looks for cards; all before it is.
    with pytest.raises(PaCAError, match=r"Gaudi software .* is not installed"):
        build("--config", str(path))
    strategy = settings_of(path)["trainer"]["strategy"]
    built = instantiate_class((), strategy | {"init_args": strategy.get("init_args", {})})
    assert isinstance(built, SingleHPUStrategy | HPUFSDP2Strategy)


USERS = ["LearningRateMonitor", "DeviceStatsMonitor"]


@pytest.mark.parametrize("path", FRAGMENTS, ids=names_of(FRAGMENTS))
def test_fragment_adds_its_callbacks_to_those_there_are(path: Path, tmp_path: Path) -> None:
    more = []
    if path.stem == "from_adapter":
        model = tiny_llama()
        apply_paca(model, PaCAConfig(r=3))
        save_adapter(model, tmp_path / "adapter")
        more = [f"--trainer.callbacks.adapter={tmp_path / 'adapter'}"]
    base = settings_of(ROOT / "configs" / "debug.yaml")
    base["trainer"]["callbacks"] = [{"class_path": f"lightning.pytorch.callbacks.{name}"} for name in USERS]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    cli = build("--config", str(tmp_path / "base.yaml"), "--config", str(path), *more)
    added = [entry["class_path"].rpartition(".")[2] for entry in settings_of(path)["trainer"]["callbacks+"]]
    assert [type(callback).__name__ for callback in cli.trainer.callbacks][: len(USERS + added)] == USERS + added


# What a config needs that this machine may not have is replaced by what it has; the rest stays as it is written.


def runnable(path: Path, directory: Path, devices: int = 1) -> list[str]:
    """Arguments that run a config with a tiny model, two steps on small local data, on CPU devices.

    One device has a strategy of its own; on more, the config's is kept.
    """
    directory.mkdir(exist_ok=True)
    settings = settings_of(path)
    trainer, model, data = settings["trainer"], settings["model"]["init_args"], settings["data"]["init_args"]
    trainer |= {"accelerator": "cpu", "devices": devices}
    trainer |= {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 2}
    trainer["strategy"] = trainer["strategy"] if devices > 1 else "auto"
    trainer |= {"log_every_n_steps": 1, "default_root_dir": str(directory), "num_sanity_val_steps": 0}
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"name": None}}
    trainer.setdefault("logger", csv)["init_args"]["save_dir"] = str(directory)
    tiny = str(tiny_model_directory(directory / "tiny", max_position_embeddings=2048))
    model["model"] = data["tokenizer"] = tiny
    if "MMLU" in settings["data"]["class_path"]:
        data["source"] = str(mmlu_in(directory / "mmlu"))
        for callback in trainer["callbacks"]:
            if "MMLU" in callback["class_path"]:
                callback["init_args"]["limit"] = 1
    else:
        data["cache_dir"] = str(directory / "cache")
        if data.get("format") == "guanaco":
            data["train"] = data["validation"] = str(guanaco_in(directory))
        elif not Path(data["train"]).exists():  # the user's own, or the study's, which is fetched
            data |= dict.fromkeys({"train", "validation"} & data.keys(), "configs/data/quickstart/train.jsonl")
    replaced = directory / "config.yaml"
    replaced.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return ["--config", str(replaced)]


def guanaco_in(directory: Path) -> Path:
    """The quickstart's conversations as the OASST1 jobs' data set has its own."""
    lines = (ROOT / "configs" / "data" / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    names = {"user": "Human", "assistant": "Assistant"}
    with (directory / "guanaco.jsonl").open("w", encoding="utf-8") as file:
        for line in lines:
            turns = [f"### {names[turn['role']]}: {turn['content']}" for turn in json.loads(line)["messages"]]
            file.write(json.dumps({"text": "".join(turns)}) + "\n")
    return directory / "guanaco.jsonl"


def mmlu_in(directory: Path) -> Path:
    """Four subjects of made-up questions, and an auxiliary_train of them without subjects."""
    write_csv_folders(directory)
    rows = [{**row, "subject": ""} for row in rows_of("anatomy", "dev")] * 4
    (directory / "auxiliary_train").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(directory / "auxiliary_train" / "train.parquet")
    return directory


RUN_ELSEWHERE = {"configs/debug.yaml": "tests/test_cli.py"}
RUN_HERE = [path for path in CONFIGS if path.relative_to(ROOT).as_posix() not in RUN_ELSEWHERE]


def assert_trained(version: Path) -> None:
    assert len(logged(version, "train/loss")) == 2
    names = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    layers = [path.rpartition(".")[2] for path in trained_layers(version / "adapter")]
    assert sorted(layers) == sorted(2 * names)


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN_HERE, ids=names_of(RUN_HERE))
def test_config_trains_a_tiny_model(path: Path, tmp_path: Path) -> None:
    main(["fit", *runnable(path, tmp_path)])
    assert_trained(tmp_path / "version_0")


ON_RANKS = [path for path in CONFIGS if path.stem.endswith("-fsdp2") or path.stem.startswith("ddp-")]


def fit_each(runs: list[list[str]]) -> None:
    for arguments in runs:
        main(["fit", *arguments])


@pytest.mark.distributed
def test_sharded_configs_and_ddp_train_a_tiny_model_on_two_ranks(tmp_path: Path) -> None:
    launch(fit_each, 2, [runnable(path, tmp_path / path.stem, devices=2) for path in ON_RANKS])
    assert len(ON_RANKS) == 3
    for path in ON_RANKS:
        assert_trained(tmp_path / path.stem / "version_0")
