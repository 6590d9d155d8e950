"""The jobs in configs/gaudi, run by the command line on a simulated HPU with a tiny model and little data."""

import os
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from paca_lightning.cli import main
from tests.artefacts import logged, trained_layers
from tests.distributed_launch import launch
from tests.simulated_hpu.processes import ROOT, Run
from tests.test_configs import guanaco_in, mmlu_in
from tests.tiny import tiny_model_directory

pytest_plugins = ["tests.simulated_hpu.fixtures"]

OASST1, MMLU, SHARDED = "gaudi/oasst1-llama3-8b", "gaudi/mmlu-llama2-7b", "gaudi/oasst1-llama3.1-70b"
FP32 = ["--trainer.precision=32-true", "--model.init_args.dtype=float32"]
ON_A_CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]


class Witness(Callback):
    """Writes the strategy and the device of a run to a file beside the metrics."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        directory = Path(str(trainer.log_dir))  # asked on all ranks, as they agree on it
        if trainer.is_global_zero:
            place = f"{type(trainer.strategy).__name__} on {trainer.world_size} x {pl_module.device}"
            (directory / "place").write_text(place)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model and data sets instead of those of the hub."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_model_directory(directory / "model", max_position_embeddings=2048)
    mmlu_in(directory / "mmlu")
    guanaco_in(directory)
    return directory


def run_cli(command: str, config: str, tiny: Path, output: Path, *more: str) -> Path:
    """Run ``paca-lightning COMMAND --config configs/CONFIG.yaml`` at a small size. Returns the folder of the run."""
    os.chdir(ROOT)
    data = [f"train={tiny}/guanaco.jsonl", f"validation={tiny}/guanaco.jsonl", f"cache_dir={tiny}/cache"]
    if config == MMLU:
        data = [f"source={tiny}/mmlu", "train=[dev,validation]", "validation_split=test"]
    main(
        [
            *(command, f"--config=configs/{config}.yaml", f"--model.init_args.model={tiny}/model"),
            *(f"--data.init_args.{setting}" for setting in (f"tokenizer={tiny}/model", "max_length=128", *data)),
            *("--trainer.max_steps=4", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=2"),
            *(f"--trainer.default_root_dir={output}", f"--trainer.logger.init_args.save_dir={output}"),
            *(*more, "--trainer.callbacks+=tests.strategies.hpu.test_cli.Witness"),
        ]
    )
    return max(output.glob("version_*"))


def checkpoint(run: Path) -> str:
    return f"--ckpt_path={next((run / 'checkpoints').glob('*.ckpt'))}"


# In fp32 only attention rounds differently: PyTorch has a fused kernel on CPUs, and none on the HPU.
TOLERANCES = {"bf16-true": 1e-2, "32-true": 1e-6}


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("config", [OASST1, MMLU])
def test_config_for_one_card(hpu_host: Run, tiny: Path, tmp_path: Path, config: str, precision: str) -> None:
    more = FP32 if precision == "32-true" else []
    on_hpu = hpu_host(run_cli, "fit", config, tiny, tmp_path / "hpu", *more)
    on_cpu = run_cli("fit", config, tiny, tmp_path / "cpu", *more, *ON_A_CPU)
    assert (on_hpu / "place").read_text() == "SingleHPUStrategy on 1 x hpu:0"
    assert (on_cpu / "place").read_text() == "SingleDeviceStrategy on 1 x cpu"
    for name in ("train/loss", "val/loss"):
        assert logged(on_hpu, name) == pytest.approx(logged(on_cpu, name), rel=TOLERANCES[precision])
    assert len(logged(on_hpu, "train/loss")) == 4
    assert len(trained_layers(on_hpu / "adapter")) == 14


def test_mmlu_is_trained_validated_and_tested(hpu_host: Run, tiny: Path, tmp_path: Path) -> None:
    both = ["--trainer.callbacks.methods=[letter,likelihood]", *FP32]
    fit = hpu_host(run_cli, "fit", MMLU, tiny, tmp_path / "hpu", *FP32)
    for command in ("validate", "test"):
        arguments = (command, MMLU, tiny, tmp_path / command)
        on_hpu = hpu_host(run_cli, *arguments, *both, checkpoint(fit))
        on_cpu = run_cli(*arguments, *both, checkpoint(fit), *ON_A_CPU)
        assert on_hpu != on_cpu
        for name in ("accuracy", "letter/micro", "likelihood/micro", "likelihood/STEM"):
            assert logged(on_hpu, f"mmlu/{name}") == logged(on_cpu, f"mmlu/{name}") != []
        loss = f"{command.replace('validate', 'val')}/loss"
        assert logged(on_hpu, loss) == pytest.approx(logged(on_cpu, loss), rel=1e-6)
        assert next((on_hpu / "mmlu").glob(f"{command}-*.json"))
    trained = float(logged(tmp_path / "validate" / "version_0", "val/loss")[0])
    assert trained == logged(fit, "val/loss")[-1], "the checkpoint's columns are evaluated"


def test_run_resumes_from_its_checkpoint(hpu_host: Run, tiny: Path, tmp_path: Path) -> None:
    epochs = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2", "--trainer.max_steps=-1"]
    saving = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]
    straight = hpu_host(run_cli, "fit", OASST1, tiny, tmp_path / "straight", *epochs, *saving)
    first_epoch = f"--ckpt_path={straight}/checkpoints/epoch=0-step=2.ckpt"
    resumed = hpu_host(run_cli, "fit", OASST1, tiny, tmp_path / "resumed", *epochs, first_epoch)
    assert logged(resumed, "train/loss") == logged(straight, "train/loss")[2:]
    adapters = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (straight, resumed)]
    assert adapters[0] == adapters[1]


def test_config_for_any_machine_uses_the_card_of_a_gaudi_host(hpu_host: Run, tiny: Path, tmp_path: Path) -> None:
    assert "accelerator: auto" in (ROOT / "configs" / "debug.yaml").read_text()
    on_hpu = hpu_host(run_cli, "fit", "debug", tiny, tmp_path / "hpu")
    on_cpu = run_cli("fit", "debug", tiny, tmp_path / "cpu", *ON_A_CPU)
    assert (on_hpu / "place").read_text() == "SingleHPUStrategy on 1 x hpu:0"
    assert logged(on_hpu, "train/loss") == pytest.approx(logged(on_cpu, "train/loss"), rel=1e-5)


@pytest.mark.distributed
def test_config_for_all_cards_shards_over_four(hpu_host: Run, tiny: Path, tmp_path: Path) -> None:
    arguments = ("fit", SHARDED, tiny, tmp_path / "hpu", *FP32, "--trainer.devices=4")
    on_hpu = hpu_host(launch, run_cli, 4, *arguments)[0]
    same_rows = "--data.init_args.batch_size=8"  # in a step
    on_cpu = run_cli("fit", SHARDED, tiny, tmp_path / "cpu", *FP32, *ON_A_CPU, same_rows)
    assert (on_hpu / "place").read_text() == "HPUFSDP2Strategy on 4 x hpu:0"
    # The mean over ranks gives every rank the same weight, although some have a few more trained tokens.
    assert logged(on_hpu, "train/loss") == pytest.approx(logged(on_cpu, "train/loss"), rel=1e-3)
    assert len(logged(on_hpu, "train/loss")) == 4
    assert len(trained_layers(on_hpu / "adapter")) == 14
