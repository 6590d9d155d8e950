"""The paca-lightning command as users type it."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from paca_lightning import PaCAConfig, PaCAError, apply_paca, load_adapter, save_adapter
from paca_lightning.cli import main
from tests.artefacts import PNG, logged, trained_layers
from tests.processes import run
from tests.tiny import tiny_llama, tiny_model_directory

ROOT = Path(__file__).parents[1]
DEBUG = ["--config", "configs/debug.yaml"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["paca-lightning"])


def converted() -> LlamaForCausalLM:
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4))
    return model


def output_to(directory: Path) -> list[str]:
    """Overrides that send a debug run's files elsewhere."""
    return [f"--trainer.default_root_dir={directory}", f"--trainer.logger.init_args.save_dir={directory}"]


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit code and stderr of a command that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code, " ".join(capsys.readouterr().err.split())


def test_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    printed = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "data", "estimate", "bench", "--debug"):
        assert command in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.strip() == "0.1.0"


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, message = failure(["train"], capsys)
    assert code == 2
    assert "'train' is no command. Commands: fit," in message


def test_a_mistyped_command_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    code, message = failure(["exprot"], capsys)
    assert code == 2
    assert "'exprot' is no command. Did you mean 'export'? Commands: fit," in message


def test_a_handled_mistake_does_not_hide_the_error_that_came_after_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(prompts: str = "") -> None:
        try:
            raise PaCAError("handled before")
        except PaCAError as handled:
            if prompts == "cause":
                raise RuntimeError("wrapped, as jsonargparse does") from handled
            raise RuntimeError("the real error")  # noqa: B904  (what is tested)

    monkeypatch.setattr("paca_lightning.tools.generate.generate", generate)
    with pytest.raises(RuntimeError, match="the real error"):
        main(["generate"])
    assert failure(["generate", "--prompts=cause"], capsys) == (2, "error: handled before")


def test_fit_leaves_an_adapter_metrics_a_plot_and_the_config(tmp_path: Path) -> None:
    main(["fit", *DEBUG, *output_to(tmp_path), "--trainer.max_epochs=1"])
    version = tmp_path / "version_0"
    assert len(trained_layers(version / "adapter")) == 14
    assert json.loads((version / "adapter" / "adapter_config.json").read_text())["peft_type"] == "PACA"
    assert logged(version, "train/loss")[-1] < logged(version, "train/loss")[0]
    assert (version / "loss.png").read_bytes().startswith(PNG)
    assert yaml.safe_load((version / "config.yaml").read_text())["trainer"]["max_epochs"] == 1
    tensors = next((version / "checkpoints").glob("*.ckpt"))
    keys = torch.load(tensors, weights_only=True)["state_dict"]
    assert all(key.endswith(("paca_delta", "paca_indices", "lm_head.weight")) for key in keys)


@pytest.mark.slow
def test_validate_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=1"]
    main(["fit", *DEBUG, *output_to(tmp_path), *short])
    checkpoint = next((tmp_path / "version_0" / "checkpoints").glob("*.ckpt"))
    trained = logged(tmp_path / "version_0", "val/loss")
    capsys.readouterr()
    main(["validate", *DEBUG, *output_to(tmp_path), f"--ckpt_path={checkpoint}"])
    printed = capsys.readouterr().out
    loss = next(line for line in printed.splitlines() if "val/loss" in line).split("│")[2].strip()
    assert float(loss) == pytest.approx(trained[-1], rel=1e-6)

    without = ["validate", *DEBUG, *output_to(tmp_path), f"--ckpt_path={checkpoint}", "--trainer.callbacks=null"]
    code, message = failure(without, capsys)
    assert code == 2
    assert "holds a PaCA adapter" in message
    assert "nor a Trainer without PaCAStrategy does that" in message


def test_callback_by_shorthand(tmp_path: Path) -> None:
    more = ["--trainer.limit_train_batches=1", "--trainer.max_epochs=1", "--trainer.callbacks=null"]
    more += ["--trainer.callbacks+=PaCAStrategy", "--trainer.callbacks.config.r=4"]
    more += ["--trainer.callbacks+=AdapterCheckpoint", "--trainer.logger=false"]
    main(["fit", *DEBUG, f"--trainer.default_root_dir={tmp_path}", *more])
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("configs/tiny-llama"))
    with pytest.raises(PaCAError, match="another base model"):
        load_adapter(other, tmp_path / "adapter")


def test_data_shows_trained_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", *DEBUG, "--samples", "1"])
    printed = capsys.readouterr().out
    assert "⟦" in printed
    assert "215" in printed


@pytest.mark.parametrize(
    ("tool", "complaint"),
    [
        ("generate", "required: model"),
        ("export", "required: model, adapter, output"),
        ("bench", "Give either a model (hub id or directory) or a preset"),
    ],
)
def test_a_tool_without_arguments_says_what_it_needs(
    tool: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = failure([tool], capsys)
    assert code == 2
    assert complaint in message


def test_export_and_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = tiny_model_directory(tmp_path / "base"), tmp_path / "adapter"
    save_adapter(converted(), adapter)
    given = ["--model", str(base), "--adapter", str(adapter)]
    main(["export", *given, "--output", str(tmp_path / "merged")])
    main(["export", *given, "--output", str(tmp_path / "lora"), "--format", "lora"])
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    for prompt in (["--prompts", '["Who are you?"]'], ["--prompts", "Who are you?"], ["--prompt=Who are you?"]):
        main(["generate", "--model", str(tmp_path / "merged"), *prompt, "--max-new-tokens", "2"])
        assert "> Who are you?\n" in capsys.readouterr().out


def test_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *DEBUG, "--print_config"])
    assert stop.value.code == 0
    assert "paca_lightning.PaCAStrategy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--trainer.callbacks.config.r=0", "r must be a positive integer"),
        ("--trainer.callbacks.config.target_modules=[q_porj]", "Did you mean 'q_proj'?"),
        ("--data.init_args.train=nowhere.jsonl", "nowhere.jsonl"),
        ("--model.init_args.model=nowhere/at-all", "nowhere/at-all"),
    ],
)
def test_mistakes_are_one_clean_message(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ["--trainer.callbacks=PaCAStrategy"] if "callbacks" in override else []
    code, printed = failure(["fit", *DEBUG, *output_to(tmp_path), *first, override], capsys)
    assert code == 2
    assert "error:" in printed
    assert message in printed
    assert "Traceback" not in printed


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(PaCAError, match="is no command"):
        main(["train", "--debug"])


class CtrlC(Callback):
    """Presses Ctrl-C in the third step."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as in a shell; Lightning leaves it ignored when it has saved."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_saves_and_exits_with_130(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted = ["--trainer.max_epochs=1000", "--trainer.callbacks+=tests.test_cli.CtrlC"]
    code, errors = failure(["fit", *DEBUG, *output_to(tmp_path), *interrupted], capsys)
    assert code == 130
    assert "Traceback" not in errors
    assert len(trained_layers(tmp_path / "version_0" / "adapter")) == 14


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--trainer.strategy", "frob"], "The trainer cannot be built: You selected an invalid strategy name"),
        (["--trainer.accelerator", "tpu"], "The trainer cannot be built: "),
        (["--trainer.logger.init_args.save_dir=/proc/nowhere"], "CSVLogger(save_dir=...): '/proc/nowhere' cannot be"),
        (["--trainer.callbacks+=PaCAStrategy"], "Found more than one stateful callback of type `PaCAStrategy`"),
        (["--ckpt_path", "nowhere.ckpt"], "There is no checkpoint 'nowhere.ckpt'"),
        (["--config=docs/performance/small-512.png"], "is no config: it is not text in UTF-8"),
        (["--ckpt_path", "configs/debug.yaml"], "'configs/debug.yaml' (--ckpt_path) is no checkpoint, or was cut off."),
    ],
)
def test_a_run_that_cannot_begin_says_why_in_a_line(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = failure(["fit", *DEBUG, *output_to(tmp_path), *arguments], capsys)
    assert code == 2
    assert complaint in message


@pytest.mark.distributed
def test_of_several_ranks_only_the_one_that_found_the_mistake_speaks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "paca_lightning.cli", "fit", *DEBUG, *output_to(tmp_path)]
    ranks = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    ended = run([*command, *ranks, "--data.train=nowhere.jsonl"], directory=ROOT)
    assert ended.returncode == 2
    assert "nowhere.jsonl" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_an_adapter_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(converted(), tmp_path / "adapter")
    code, message = failure(["fit", *DEBUG, *output_to(tmp_path), f"--ckpt_path={tmp_path / 'adapter'}"], capsys)
    assert code == 2
    assert "is an adapter, no checkpoint of a run. PaCAStrategy takes it" in message


@pytest.mark.slow
def test_what_the_user_gives_wins_over_the_checkpoints_hyperparameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--trainer.limit_train_batches=1", "--trainer.max_epochs=1"]
    main(["fit", *DEBUG, *output_to(tmp_path), *short])
    checkpoint = next((tmp_path / "version_0" / "checkpoints").glob("*.ckpt"))
    elsewhere = ["--model.init_args.model=/no/such/model", f"--ckpt_path={checkpoint}"]
    code, message = failure(["validate", *DEBUG, *output_to(tmp_path), *elsewhere], capsys)
    assert code == 2
    assert "'/no/such/model' does not exist" in message


def test_data_help_teaches_its_own_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    printed = capsys.readouterr().out
    assert "paca-lightning data --config FILE" in printed
    assert "--samples N" in printed
    assert failure(["data", *DEBUG, "--samples=-2"], capsys)[0] == 2


@pytest.mark.parametrize("name", ["model", "adapter"])
def test_export_writes_over_neither_the_model_nor_the_adapter(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"model": tiny_model_directory(tmp_path / "model"), "adapter": tmp_path / "adapter"}
    paths["adapter"].mkdir()
    before = sorted(path.name for path in paths[name].iterdir())
    arguments = [f"--model={paths['model']}", f"--adapter={paths['adapter']}", f"--output={paths[name]}"]
    code, message = failure(["export", *arguments], capsys)
    assert code == 2
    assert f"--output is --{name}" in message
    assert sorted(path.name for path in paths[name].iterdir()) == before


@pytest.mark.parametrize("tool", ["generate", "export"])
def test_tools_take_the_revision_of_a_model_and_its_code(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = []

    def load(name: str, **settings: object) -> object:
        given.append({key: settings[key] for key in ("revision", "trust_remote_code")})
        if len(given) == 2:
            raise PaCAError("both are asked for")
        return tiny_llama()

    for loader in ("build_causal_lm", "load_tokenizer"):
        monkeypatch.setattr(f"paca_lightning.tools.model_with_adapters.{loader}", load)
    save_adapter(converted(), tmp_path / "adapter")
    more = [f"--adapter={tmp_path / 'adapter'}"]
    more += ["--prompts=hi"] if tool == "generate" else [f"--output={tmp_path / 'out'}"]
    _, message = failure([tool, "--model=owner/name", "--revision=v1", "--trust-remote-code", *more], capsys)
    assert "both are asked for" in message
    assert given == [{"revision": "v1", "trust_remote_code": True}] * 2


def test_export_does_not_replace_another_trained_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = converted()
    for name in ("one", "other"):
        save_adapter(model, tmp_path / name)
    given = [f"--model={tiny_model_directory(tmp_path / 'base')}", f"--adapter={tmp_path / 'one'}"]
    for kind in ("merged", "lora"):
        code, message = failure(["export", *given, f"--output={tmp_path / 'other'}", f"--format={kind}"], capsys)
        assert code == 2
        assert "--output holds a trained adapter, which would be lost" in message
