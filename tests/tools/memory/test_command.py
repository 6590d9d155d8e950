"""The command estimate: what it prints, and what it refuses."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from paca_lightning import PaCAConfig, PaCAError
from paca_lightning.tools.memory.command import main
from paca_lightning.tools.memory.from_config import read_config, run_to_trace
from paca_lightning.tools.memory.report import print_report
from paca_lightning.tools.memory.timeline import Kind
from paca_lightning.tools.memory.traced_model import TracedModel
from tests.tools.memory.runs import DEBUG


@pytest.mark.slow
def test_the_command_says_whether_a_config_fits_and_what_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "estimate.json"
    assert main([*DEBUG, "--budget", "64MiB", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    paca, lora, _, full = report["rows"]
    assert [row["method"] for row in (paca, lora, full)] == ["PaCA", "LoRA", "full fine-tuning"]
    assert paca["peak_bytes"] == sum(paca[f"{kind.name.lower()}_bytes"] for kind in Kind)
    assert report["setup"]["tokens"] == 192
    assert paca["max_tokens"] >= 192
    assert paca["max_tokens"] > lora["max_tokens"]
    assert "fits 64MiB" in capsys.readouterr().out

    module, datamodule, trainer = read_config(DEBUG)
    most = paca["max_tokens"]
    fitting, beyond = (
        TracedModel(run_to_trace(module, datamodule, trainer, tokens=tokens)[0]).step().peak
        for tokens in (most, round(1.02 * most) + 64)
    )
    assert fitting <= 64 * 2**20 < beyond
    assert main([*DEBUG, "--budget", f"{paca['peak_bytes'] - 1}"]) == 1


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (PaCAConfig(quantize="nf4", selection="output_error"), True),
        (PaCAConfig(quantize="nf4"), False),
        (PaCAConfig(selection="gradient_norm"), False),
        (None, False),
    ],
)
def test_a_model_that_is_quantized_later_is_named(config: PaCAConfig | None, says: bool) -> None:
    row: dict[str, Any] = {"method": "PaCA", "peak_bytes": 1, "trainable_parameters": 1}
    row |= {f"{kind.name.lower()}_bytes": 0 for kind in Kind}
    setup: dict[str, Any] = {
        "model": "m",
        "batch_size": 1,
        "tokens": 64,
        "precision": "32-true",
        "ranks": 1,
        "sharded": False,
    }
    console = Console(file=StringIO(), width=200)
    setup |= {"budget": None, "config": None if config is None else config.to_dict()}
    print_report([row], setup, console)
    assert ("the model is held as it is, and quantized after" in console.file.getvalue()) is says  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "llama9"], "no preset 'llama9'"),
        (["--budget", "1KiB"], "below the model itself"),
        (["--budget", "much"], "'much' is not an amount of memory. Write it as 24GiB, 512MiB or 80GB"),
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--json", "/nowhere/at/all.json"], "there is no directory '/nowhere/at'"),
        (["--trainer.devices", "auto"], "depends on the machine"),
        (["--trainer.strategy", "fsdp"], "not estimated"),
        (["--model.init_args.model", "./nothing"], "does not exist"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        main([*DEBUG, *arguments])


def test_without_a_network_a_known_shape_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PaCAError, match=r"could not be loaded(?s:.*)needs no files: --preset NAME, one of small, "):
        main([*DEBUG, "--model.init_args.model", "nobody/no-such-model"])


@pytest.mark.parametrize("arguments", [[], ["--budget", "24GiB"]])
def test_without_a_config_the_way_to_give_one_is_shown(arguments: list[str]) -> None:
    with pytest.raises(PaCAError, match="paca-lightning estimate --config FILE"):
        main(arguments)


def test_help_teaches_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "--budget",
        "--json",
        "--preset",
        "--tokens",
        "--batch",
        "24GiB",
        "llama3-8b",
        "examples:",
        "fit --help",
    ):
        assert word in text


def test_a_config_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer:\n  devices: 1\n")
    with pytest.raises(PaCAError, match=r"arguments are required: .*model"):
        main(["--config", str(tmp_path / "config.yaml")])
