"""``paca-lightning dynamics``: what is measured along a history is what the model does, and is measured once."""

import csv
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from paca_lightning import PaCAError, load_adapter, paca_layers
from paca_lightning.adapters.history import read_history
from paca_lightning.cli import main
from paca_lightning.tasks import CausalLMModule, InstructionDataModule
from paca_lightning.tools.dynamics.movement import effective_rank, movements, shares_by_kind, updates_of
from paca_lightning.tools.dynamics.recitation import LONGEST, SHORTEST, excerpts_of, recited
from paca_lightning.tools.dynamics.row_sets import drawn, parse_files, row_sets
from tests.artefacts import PNG, logged
from tests.tiny import tiny_llama, tiny_model_directory

STEPS = 40
TRAINED = [
    "The quick brown fox sleeps on the lazy dog, and Ada is the capital of France.",
    "My name is Paris. What is your name? The dog jumps over the capital.",
    "Question: What is the fox? Answer: Ada, and I am here to help the dog.",
]
HELD_OUT = ["What is the capital of the fox? The lazy dog is your name.", "Ada jumps over Paris, and sleeps on France."]


def rows_file(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def run_config(directory: Path, strategy: dict[str, Any]) -> dict[str, Any]:
    """A run that learns three rows by heart, with its history."""
    model = str(tiny_model_directory(directory / "model"))
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "val_check_interval": 20,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(directory), "name": None}},
            "callbacks": [
                {"class_path": "AdapterHistory", "init_args": {"every_n_steps": 20, "log_spaced_to": 8}},
                strategy,
            ],
        },
        "model": {
            "class_path": "CausalLMModule",
            "init_args": {
                "model": model,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2, "weight_decay": 0.0}},
            },
        },
        "data": {
            "class_path": "InstructionDataModule",
            "init_args": {
                "tokenizer": model,
                "train": rows_file(directory / "train.jsonl", TRAINED),
                "validation": rows_file(directory / "validation.jsonl", HELD_OUT),
                "format": "text",
                "batch_size": 3,
            },
        },
    }


def trained_run(directory: Path, strategy: dict[str, Any]) -> Path:
    """The directory of such a run."""
    (directory / "config.yaml").write_text(yaml.safe_dump(run_config(directory, strategy)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["paca-lightning"])
        main(["fit", "--config", str(directory / "config.yaml")])
    return directory / "version_0"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of PaCA."""
    paca = {"class_path": "PaCAStrategy", "init_args": {"config": {"r": 16, "modules_to_save": ["lm_head"]}}}
    return trained_run(tmp_path_factory.mktemp("run"), paca)


@pytest.fixture(scope="module")
def shown(trained: Path) -> Path:
    """The results of the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["paca-lightning"])
        again = rows_file(trained.parent / "again.jsonl", HELD_OUT)
        main(["dynamics", str(trained / "history"), "--k", "4", "--rows", f"again={again}"])
    return trained / "dynamics"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def model_at(trained: Path, step: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(trained.parent / "model")
    load_adapter(model, trained / "history" / f"step-{step:08d}")
    return model.eval()


def token_rows(trained: Path) -> list[dict[str, Any]]:
    data = InstructionDataModule(str(trained.parent / "model"), str(trained.parent / "train.jsonl"), format="text")
    return row_sets(data, {}, 0)[0].token_rows()


def test_a_row_learned_by_heart_is_recited_and_the_untrained_model_recites_none(shown: Path) -> None:
    rows = {int(row["step"]): row for row in table(shown / "dynamics.csv")}
    assert sorted(rows) == [0, 1, 2, 4, 8, 20, 40]
    assert float(rows[0]["recited/train"]) == float(rows[0]["recited/held-out"]) == 0
    assert float(rows[STEPS]["recited/train"]) == 1
    assert float(rows[STEPS]["recited tokens/train"]) == 1
    assert float(rows[STEPS]["recited/held-out"]) == 0
    assert float(rows[STEPS]["recited tokens/held-out"]) < 0.5
    found = table(shown / "recited.csv")
    assert len(found) == 3
    texts = [row["context"] + row["continuation"] for row in found]
    assert all(any(text.startswith(one[:20]) for text in texts) for one in TRAINED)
    assert {row["at_last_step"] for row in found} == {"True"}
    assert all(0 < int(row["first_step"]) <= STEPS for row in found)


def test_losses_are_those_of_the_run(trained: Path, shown: Path) -> None:
    last = table(shown / "dynamics.csv")[-1]
    own = logged(trained, "val/loss")[-1]
    assert float(last["held_out_step"]) == STEPS
    assert float(last["loss/held-out"]) == float(last["held_out_loss"]) == own
    assert last["loss/again"] == last["loss/held-out"]
    assert float(last["loss/train"]) < 0.5 < float(last["loss/held-out"])


def test_one_forward_tells_what_greedy_decoding_would_say(trained: Path) -> None:
    excerpts = excerpts_of(token_rows(trained), 4)
    assert len(excerpts) == 3
    seen = set()
    for step in (0, 8, 20, STEPS):
        model = model_at(trained, step)
        counts = []
        for one in excerpts:
            ids = torch.tensor([one.context])
            length = len(one.continuation)
            said = model.generate(ids, max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0)
            right = (said[0, ids.shape[1] :] == torch.tensor(one.continuation)).long().cumprod(0)
            counts.append(int(right.sum()))
        assert recited(model, excerpts, 2) == counts
        seen |= {count / len(one.continuation) for count, one in zip(counts, excerpts, strict=True)}
    assert {0, 1} < seen  # also rows that are recited in part


def test_movement_is_that_of_the_columns(trained: Path, shown: Path) -> None:
    rows = table(shown / "layers.csv")
    model = model_at(trained, 20)
    layers = dict(paca_layers(model))
    of_step = {row["layer"]: row for row in rows if row["step"] == "20"}
    assert of_step.keys() == layers.keys()
    last = updates_of(trained / "history" / f"step-{STEPS:08d}")
    for path, layer in layers.items():
        update = (layer.weight[:, layer.paca_indices] - layer.paca_base_columns).double()
        assert float(of_step[path]["norm"]) == pytest.approx(float(update.norm()), rel=1e-4)  # of rounded fp32 weights
        cosine = torch.nn.functional.cosine_similarity(update.flatten(), last[path].flatten(), dim=0)
        assert float(of_step[path]["cosine"]) == pytest.approx(float(cosine), abs=1e-4)
        assert 1 < float(of_step[path]["effective_rank"]) <= 16
        assert of_step[path]["kind"] == path.rpartition(".")[2]
    assert {row["cosine"] for row in rows if row["step"] == "0"} == {""}
    assert {round(float(row["cosine"]), 9) for row in rows if row["step"] == str(STEPS)} == {1.0}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_effective_rank_and_shares() -> None:
    one = random(9, 1) @ random(1, 4)
    assert effective_rank(one) == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.linalg.qr(random(9, 4))[0]) == pytest.approx(4)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))) == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )
    assert effective_rank(torch.zeros(3, 2, dtype=torch.float64)) is None
    stacked = random(12, 4)  # of three experts
    assert effective_rank(stacked.view(3, 4, 4)) == effective_rank(stacked)
    updates = {"a.q_proj": torch.full((2, 2), 3.0).double(), "b.q_proj": torch.zeros(2, 2).double(), "a.v": one}
    found = movements(updates, {path: -update for path, update in updates.items()})
    assert [layer["cosine"] and round(layer["cosine"], 12) for layer in found] == [-1, None, -1]
    total = 36 + float(one.square().sum())
    assert shares_by_kind(found) == pytest.approx({"q_proj": 36 / total, "v": 1 - 36 / total})


def test_excerpts_are_of_trained_stretches() -> None:
    ids = list(range(100))
    chat = {"input_ids": ids, "trained": [False] * 10 + [True] * 6 + [False] * 4 + [True] * 60 + [False] * 20}
    (one,) = excerpts_of([{"input_ids": ids[:5], "trained": [True] * 5}, chat], 4)
    assert one == (1, ids[:24], ids[24 : 24 + LONGEST])  # the first stretch is too short
    raw = {"input_ids": ids[: SHORTEST + 1], "trained": [True] * (SHORTEST + 1)}
    assert excerpts_of([raw], 0) == [(0, ids[:1], ids[1 : SHORTEST + 1])]
    assert excerpts_of([raw], 2) == []


def test_the_page_opens_without_a_network(shown: Path) -> None:
    text = (shown / "index.html").read_text(encoding="utf-8")
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', text))
    assert len(re.findall(r"<img ", text)) == 4
    assert not re.search(r"https?://|<script|<link", text)
    for name in ("loss", "memorization", "movement", "shares"):
        assert (shown / f"{name}.png").read_bytes().startswith(PNG)


def test_what_is_measured_is_not_measured_again(
    trained: Path, shown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["paca-lightning"])
    before = (shown / "dynamics.csv").read_bytes()
    asked: list[str] = []
    build = CausalLMModule.configure_model

    def configure_model(module: CausalLMModule) -> None:
        asked.append("built")
        build(module)

    monkeypatch.setattr(CausalLMModule, "configure_model", configure_model)
    options = ["dynamics", str(trained / "history"), "--k=4", f"--rows=again={trained.parent / 'again.jsonl'}"]
    main(options)
    assert asked == []
    assert (shown / "dynamics.csv").read_bytes() == before
    shutil.copytree(shown / "points", tmp_path / "points")
    shutil.rmtree(tmp_path / "points" / "step-00000008")  # as if the command had been stopped
    main([*options, "--output", str(tmp_path), "--steps", "8", "40"])
    assert asked == ["built"]
    whole = {row["step"]: row for row in table(shown / "dynamics.csv")}
    assert table(tmp_path / "dynamics.csv") == [whole["8"], whole["40"]]


def test_rows_are_drawn_once_for_all_steps(trained: Path) -> None:
    data = InstructionDataModule(str(trained.parent / "model"), str(trained.parent / "train.jsonl"), format="text")
    (rows,) = row_sets(data, {}, 2)
    assert rows.describe() == "2 of 3 rows, drawn at random"
    assert rows.split.column("row").tolist() == drawn(data.splits["train"], 2).column("row").tolist()
    assert row_sets(data, {}, 0)[0].describe() == "3 rows"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--k=-1"], "--k must not be negative, not -1"),
        (["--limit=-1"], "--limit must not be negative"),
        (["--steps", "8", "9"], r"--steps: step 9 is not in .*history'\. There are 0, 1, 2, 4, 8, 20, 40"),
        (["--rows=facts"], "--rows 'facts': give a name and a file"),
        (["--rows=train=x.jsonl"], "there is a set 'train' already"),
        (["--rows=facts=gone.jsonl"], "gone.jsonl"),
        (["--config=gone.yaml"], "There is no 'gone.yaml'.*Correct --config"),
        (["--stepz=3"], "stepz"),
    ],
)
def test_mistakes_are_told(
    trained: Path, options: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["dynamics", str(trained / "history"), "--output", str(tmp_path), *options])
    assert stop.value.code == 2
    assert re.search(complaint, capsys.readouterr().err)


def test_other_bases_and_what_is_no_history_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "model"
    shutil.copytree(trained.parent / "model", other)
    tiny_llama(seed=1).save_pretrained(other)
    shutil.copytree(trained / "history", tmp_path / "history")
    config, history = ["--config", str(trained / "config.yaml")], str(tmp_path / "history")

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(["dynamics", *arguments])
        return capsys.readouterr().err

    assert "trained on another base model" in refused(history, *config, f"--model.init_args.model={other}")
    assert "config.yaml', which says which model and data the run had. Give" in refused(history)
    shutil.rmtree(tmp_path / "history" / "step-00000008")
    assert "step 8 is missing (1 of the 7 steps in history.json)" in refused(history, *config)
    (tmp_path / "empty").mkdir()
    assert "holds no history" in refused(str(tmp_path / "empty"), *config)
    assert "is one step of a history" in refused(str(read_history(trained / "history").path(8)), *config)


def test_names_of_files() -> None:
    assert parse_files(["a=x=y.jsonl", "b=z"]) == {"a": "x=y.jsonl", "b": "z"}
    for wrong in (["a="], ["=x"], ["a=x", "a=y"], ["held-out=x"]):
        with pytest.raises(PaCAError, match="--rows"):
            parse_files(wrong)


def test_rows_too_short_for_k_are_said_before_anything_is_measured(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--k=60", "--steps=0", f"--output={tmp_path}"]
    main(["dynamics", str(trained / "history"), *options])
    assert "No row of train, held-out has 60 + 8 trained tokens: lower --k." in capsys.readouterr().err
    (row,) = table(tmp_path / "dynamics.csv")
    assert row["recited/train"] == row["longest/train"] == ""
    assert float(row["loss/train"]) > 1
    assert "None was recited word by word" in (tmp_path / "index.html").read_text(encoding="utf-8")
