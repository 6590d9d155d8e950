"""A config as a task: its learning rate, its seeds, and the trials made of it."""

from pathlib import Path
from typing import Any

import pytest

from paca_lightning import PaCAConfig, PaCAError, apply_paca, save_adapter
from paca_lightning.tools.compare.methods import AsConfigured, Method
from paca_lightning.tools.compare.parsing import parse_method
from paca_lightning.tools.compare.task import Task, find_learning_rate, replaced, seed_keys, short_name
from paca_lightning.tools.compare.trial import Trial, make_trial
from tests.tiny import tiny_llama
from tests.tools.compare.tasks import ROOT, debug_task

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "eps": 1e-8}}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["paca-lightning"])


@pytest.fixture
def task() -> Task:
    return debug_task()


def trial(task: Task, method: Method, seed: int = 1, **settings: Any) -> Trial:
    given: dict[str, Any] = {"searching": False, "steps": None, "metric": "val/loss", "parent": Path("out")}
    return make_trial(task, method, 3e-3, seed, **given | settings)


def names(of: Trial) -> list[str]:
    return [short_name(entry) for entry in of.settings["trainer"]["callbacks"]]


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ({"init_args": {"optimizer": ADAMW}}, ("model", "init_args", "optimizer", "init_args", "lr")),
        ({"init_args": {"learning_rate": 0.1, "width": 3}}, ("model", "init_args", "learning_rate")),
    ],
)
def test_the_learning_rate_is_found(model: dict[str, Any], key: tuple[str, ...]) -> None:
    assert find_learning_rate({"model": model}, "a") == key


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ({"init_args": {"width": 3}}, "Found: none"),
        ({"init_args": {"lr": 0.1, "b": ADAMW}}, "Found: model.init_args.lr, model.init_args.b.init_args.lr"),
    ],
)
def test_a_learning_rate_that_is_not_found(model: dict[str, Any], found: str) -> None:
    with pytest.raises(PaCAError, match=rf"{found}\. Say where it is with --lr-key"):
        find_learning_rate({"model": model}, "a")


def test_a_key_that_is_nowhere() -> None:
    with pytest.raises(PaCAError, match=r"no setting 'init_args.lr' where the learning rate should be"):
        replaced({"model": {}}, ("init_args", "lr"), 1.0)


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        ({"seed": 0, "validation_fraction": 0.0}, ["seed_everything", "data.init_args.seed"]),
        ({"seed": 0, "validation_fraction": 0.1}, ["seed_everything"]),
        ({"seed": 0, "limit": 4}, ["seed_everything"]),
        ({}, ["seed_everything"]),
    ],
)
def test_seeds_never_change_what_is_validated_on(data: dict[str, Any], keys: list[str]) -> None:
    assert [".".join(key) for key in seed_keys({"data": {"init_args": data}})] == keys


def test_a_trial_changes_the_method_the_rate_and_the_seeds_and_nothing_else(task: Task) -> None:
    made = trial(task, parse_method("paca:4"), seed=5)
    paca = made.settings["trainer"]["callbacks"][0]["init_args"]["config"]
    assert names(made) == ["PaCAStrategy"]
    assert (paca["r"], paca["seed"], paca["modules_to_save"]) == (4, 5, ["lm_head"])
    assert made.settings["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 3e-3
    assert made.settings["seed_everything"] == made.settings["data"]["init_args"]["seed"] == 5
    untouched = ("max_epochs", "val_check_interval", "precision", "accumulate_grad_batches")
    assert all(made.settings["trainer"][name] == task.settings["trainer"][name] for name in untouched)


def test_methods_differ_in_their_callbacks_alone(task: Task) -> None:
    settings = [trial(task, parse_method(text)).settings for text in ("paca:4", "full")]
    for one in settings:
        del one["trainer"]["callbacks"], one["trainer"]["default_root_dir"], one["trainer"]["logger"]
    assert settings[0] == settings[1]


def test_steps_replace_epochs(task: Task) -> None:
    trainer = trial(task, parse_method("full"), steps=7).settings["trainer"]
    assert (trainer["max_steps"], trainer["max_epochs"]) == (7, -1)


def test_what_shows_or_saves_is_left_out_and_all_else_stays() -> None:
    task = debug_task("--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging")
    assert names(trial(task, parse_method("full"))) == ["EMAWeightAveraging"]
    assert names(trial(task, parse_method("paca:4"))) == ["PaCAStrategy", "EMAWeightAveraging"]
    assert names(trial(task, AsConfigured("run"))) == ["PaCAStrategy", "EMAWeightAveraging"]


def test_other_settings_are_another_directory(task: Task) -> None:
    paths = {trial(task, parse_method(text)).directory for text in ("paca:4,name=a", "paca:4,name=b", "paca:8,name=a")}
    assert len(paths) == 3
    assert trial(task, parse_method("paca:4,name=a")).directory in paths


def test_methods_start_from_the_base_model(tmp_path: Path) -> None:
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4))
    save_adapter(model, tmp_path / "adapter")
    settings = f"{{class_path: PaCAStrategy, init_args: {{adapter: {tmp_path / 'adapter'}}}}}"
    with pytest.raises(PaCAError, match="starts from a trained adapter"):
        debug_task(f"--trainer.callbacks=[{settings}]")
