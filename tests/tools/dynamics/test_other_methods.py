"""``paca-lightning dynamics`` on histories of other methods, and the runs that it refuses by name."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from paca_lightning.adapters.history import read_history
from paca_lightning.cli import main
from tests.artefacts import logged
from tests.tools.dynamics.test_dynamics import HELD_OUT, STEPS, run_config, table, trained_run

peft = pytest.importorskip("peft")

LORA = {
    "class_path": "paca_lightning.PEFTStrategy",
    "init_args": {
        "config": {
            "class_path": "peft.LoraConfig",
            "init_args": {"r": 16, "lora_alpha": 16, "target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        }
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA."""
    return trained_run(tmp_path_factory.mktemp("lora"), LORA)


def dynamics(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["paca-lightning"])
        main(["dynamics", *arguments])


def test_losses_and_recitation_of_lora_are_measured_and_what_is_left_out_is_said(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dynamics(str(trained / "history"), "--k", "4")
    shown = capsys.readouterr()
    assert "Left out: how columns moved, as PEFTStrategy trains none." in shown.err
    assert "cosine" not in shown.out
    rows = {int(row["step"]): row for row in table(trained / "dynamics" / "dynamics.csv")}
    assert sorted(rows) == [0, 1, 2, 4, 8, 20, 40]
    assert "norm" not in rows[0]
    last = rows[STEPS]
    assert float(last["loss/held-out"]) == float(last["held_out_loss"]) == logged(trained, "val/loss")[-1]
    assert float(rows[0]["recited/train"]) == 0
    assert float(last["recited/train"]) == 1 > float(last["recited/held-out"])
    assert not (trained / "dynamics" / "layers.csv").exists()
    page = (trained / "dynamics" / "index.html").read_text(encoding="utf-8")
    assert "Left out: how columns moved" in page
    assert page.count("<img ") == 2


@pytest.mark.parametrize(
    "strategy",
    [
        {"class_path": "BottleneckStrategy", "init_args": {"size": 8}},
        {
            "class_path": "PEFTStrategy",
            "init_args": {"config": {"class_path": "peft.PromptTuningConfig", "init_args": {"num_virtual_tokens": 4}}},
        },
    ],
)
def test_losses_are_those_of_the_run(strategy: dict[str, Any], tmp_path: Path) -> None:
    run = trained_run(tmp_path, strategy)
    dynamics(str(run / "history"), "--k", "4", "--steps", "0", str(STEPS))
    first, last = table(run / "dynamics" / "dynamics.csv")
    assert float(last["loss/held-out"]) == logged(run, "val/loss")[-1] < float(first["loss/held-out"])


def test_a_point_is_an_adapter_of_peft_and_has_its_loss(trained: Path) -> None:
    """At step 8, by PEFT alone, beside what the command says."""
    dynamics(str(trained / "history"), "--k", "4", "--steps", "8", f"--output={trained / 'one'}")
    base = AutoModelForCausalLM.from_pretrained(trained.parent / "model")
    model = peft.PeftModel.from_pretrained(base, str(read_history(trained / "history").path(8))).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(trained / "history" / "tokenizer")
    losses, count = 0.0, 0
    for text in HELD_OUT:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        losses += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    (row,) = table(trained / "one" / "dynamics.csv")
    assert float(row["loss/held-out"]) == pytest.approx(losses / count, rel=1e-5)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        dynamics(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("strategy", "module", "complaint"),
    [
        ({"class_path": "LoReFTStrategy"}, None, "dynamics cannot measure LoReFT"),
        (LORA, {"class_path": "ClassifierModule"}, "runs with a CausalLMModule, .* has a ClassifierModule"),
        ({"class_path": "PaCAStrategy"}, None, "peft_type is 'LORA', not 'PACA'"),
        (
            {"class_path": "PEFTStrategy", "init_args": {"config": {"class_path": "peft.IA3Config"}}},
            None,
            "was trained with",
        ),
    ],
)
def test_other_runs_are_refused_by_name(
    strategy: dict[str, Any],
    module: dict[str, Any] | None,
    complaint: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = run_config(trained.parent, strategy)
    if module is not None:
        labels = {"model": config["model"]["init_args"]["model"], "task": "sequence", "labels": ["a", "b"]}
        config["model"] = module | {"init_args": labels}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    given = [str(trained / "history"), f"--config={tmp_path / 'config.yaml'}", f"--output={tmp_path / 'out'}"]
    assert re.search(complaint, refused(given, capsys))
