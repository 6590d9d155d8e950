"""How runs of the command line begin, are taken up again, and end."""

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from paca_lightning.cli import main
from paca_lightning.core.errors import PaCAError
from paca_lightning.tools.run_version import claim_versions
from tests.artefacts import logged, trained_layers
from tests.processes import HANG, started
from tests.test_cli import DEBUG, ROOT, failure, output_to

SHORT = ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["paca-lightning"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of three steps, with the best of two checkpoints."""
    directory = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        monitor = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"]
        monitor += ["--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.filename=best"]
        main(["fit", *DEBUG, *output_to(directory), *SHORT, *monitor])
    finally:
        os.chdir(before)
    return directory


def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_last_is_the_newest_checkpoint_of_earlier_versions(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copied(finished, tmp_path)
    main(["fit", *DEBUG, *output_to(run), *SHORT, "--trainer.max_epochs=2", "--ckpt_path=last"])
    assert f"--ckpt_path last: {run / 'version_0' / 'checkpoints' / 'best.ckpt'}" in caplog.messages
    assert [path.name for path in (run / "version_1" / "checkpoints").iterdir()] == ["epoch=1-step=6.ckpt"]
    main(["fit", *DEBUG, *output_to(run), *SHORT, "--trainer.max_epochs=3", "--ckpt_path=last"])
    assert [path.name for path in (run / "version_2" / "checkpoints").iterdir()] == ["epoch=2-step=9.ckpt"]


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_last_without_a_checkpoint_stops(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = failure([command, *DEBUG, *output_to(tmp_path), "--ckpt_path=last"], capsys)
    assert code == 2
    assert f"There is no checkpoint to go on from (--ckpt_path). Looked for *.ckpt in {tmp_path}" in message
    assert list(tmp_path.iterdir()) == []


def test_last_passes_over_a_checkpoint_that_was_cut_off(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    broken = run / "version_1" / "checkpoints" / "last.ckpt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes((run / "version_0" / "checkpoints" / "best.ckpt").read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"last\.ckpt is cut off or no checkpoint: taking the one before it"):
        main(["validate", *DEBUG, *output_to(run), *SHORT[1:2], "--ckpt_path=last"])
    assert logged(run / "version_2", "val/loss") == logged(finished / "version_0", "val/loss")[-1:]


def test_best_is_what_the_run_monitored(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = copied(finished, tmp_path)  # so that the paths in the checkpoints are those of another place
    main(["validate", *DEBUG, *output_to(run), *SHORT[1:2], "--ckpt_path=best"])
    assert f"--ckpt_path best: {run / 'version_0' / 'checkpoints' / 'best.ckpt'}" in caplog.messages


def test_best_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *DEBUG, *output_to(tmp_path), *SHORT])
    code, message = failure(["validate", *DEBUG, *output_to(tmp_path), "--ckpt_path=best"], capsys)
    assert code == 2
    assert "Add a ModelCheckpoint with monitor: val/loss to trainer.callbacks, or use --ckpt_path last" in message


def test_a_saved_config_does_not_undo_the_checkpoint(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    saved = run / "version_0" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["ckpt_path"] is None
    given = ["--ckpt_path", str(run / "version_0" / "checkpoints" / "best.ckpt"), "--config", str(saved)]
    main(["validate", *given[:2], *DEBUG, *output_to(run), *SHORT[1:2]])
    main(["fit", *given, *output_to(run), "--trainer.max_epochs=2"])
    assert torch.load(next((run / "version_2" / "checkpoints").glob("*.ckpt")), weights_only=True)["global_step"] == 6


def test_the_config_of_a_run_serves_other_commands(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(finished, tmp_path)
    saved = str(run / "version_0" / "config.yaml")
    main(["data", "--config", saved, "--samples=0"])
    assert "215" in capsys.readouterr().out
    main(["estimate", "--config", saved, "--tokens=16", "--batch=1"])
    main(["validate", "--config", saved, *output_to(run), *SHORT[1:2], "--ckpt_path=best"])
    evaluation = str(run / "version_1" / "config.yaml")  # with a setting that only `validate` takes
    assert yaml.safe_load(Path(evaluation).read_text())["verbose"] is True
    main(["fit", "--config", evaluation, *output_to(run), "--trainer.max_epochs=2"])
    assert (run / "version_2" / "adapter").is_dir()
    for command in (["compare", "--methods=paca:4"], ["fit", "--lr=auto"]):
        code, message = failure([*command, "--config", evaluation], capsys)
        assert code == 2
        assert "the config resumes a run (ckpt_path: best), which has its learning rate" in message
    code, message = failure(["generate", "--config", saved, "--prompts=Hi"], capsys)
    assert code == 2
    assert "this one is the config of a run. Give what is needed of it: --model configs/tiny-llama, and" in message


def test_an_evaluation_of_the_base_model_says_so(finished: Path, tmp_path: Path) -> None:
    saved = ["--config", str(finished / "version_0" / "config.yaml"), *output_to(tmp_path), *SHORT[1:2]]
    with pytest.warns(UserWarning, match="validate takes the base model, as no checkpoint is given"):
        main(["validate", *saved])
    adapter = ["--trainer.callbacks=PaCAStrategy", f"--trainer.callbacks.adapter={finished / 'version_0' / 'adapter'}"]
    main(["validate", *saved, *adapter])  # says nothing: warnings are errors


def test_a_test_needs_no_training_data(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = [
        "--config",
        str(finished / "version_0" / "config.yaml"),
        *output_to(tmp_path),
        "--data.train=nowhere.jsonl",
    ]
    given = [*saved, f"--ckpt_path={finished / 'version_0' / 'checkpoints' / 'best.ckpt'}"]
    assert failure(["test", *given], capsys) == (2, "error: there is no test data: set `test` of the data module.")
    main(["test", *given, "--data.test=configs/data/quickstart/validation.jsonl", "--trainer.limit_test_batches=1"])


def test_a_run_that_took_no_step_has_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = ["--trainer.max_steps=0", "--trainer.limit_val_batches=1"]
    code, message = failure(["fit", *DEBUG, *output_to(tmp_path), *nothing], capsys)
    assert code == 2
    assert "There is no adapter: this run took no step. Look at max_steps" in message
    assert not (tmp_path / "version_0" / "adapter").exists()


def test_a_trial_of_the_code_leaves_what_was_trained(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    adapter = run / "version_0" / "adapter"
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    trial = ["--trainer.fast_dev_run=true", f"--trainer.callbacks.dirpath={adapter}"]
    main(["fit", *DEBUG, *output_to(run), "--trainer.callbacks+=AdapterCheckpoint", *trial[1:], trial[0]])
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before


def directory_of_checkpoints(run: Path) -> tuple[list[str], str]:
    return [f"--ckpt_path={run / 'version_0' / 'checkpoints'}"], "no sharded checkpoint. Name a checkpoint in it: best"


def sharded_checkpoint(run: Path) -> tuple[list[str], str]:
    (run / "sharded.ckpt").mkdir()
    (run / "sharded.ckpt" / "meta.pt").write_bytes(b"")
    return [f"--ckpt_path={run / 'sharded.ckpt'}"], "is a sharded checkpoint, which SingleDeviceStrategy does not read"


def existing_version(run: Path) -> tuple[list[str], str]:
    return ["--trainer.logger.init_args.version=0"], "CSVLogger(version=0): "


def missing_package(run: Path) -> tuple[list[str], str]:
    return ["--trainer.logger=WandbLogger"], "The run cannot be built: Requirement 'wandb"


def missing_device(run: Path) -> tuple[list[str], str]:
    return ["--trainer.accelerator=cuda", "--trainer.devices=64"], "The trainer cannot be built: "


def negative_learning_rate(run: Path) -> tuple[list[str], str]:
    return [
        "--model.init_args.optimizer.init_args.lr=-1.0"
    ], "The optimizer or its schedule refuses a setting: Invalid learning rate"


def rare_validation(run: Path) -> tuple[list[str], str]:
    return ["--trainer.val_check_interval=500"], "`val_check_interval` (500) must be less than or equal to"


def unwritable_cache(run: Path) -> tuple[list[str], str]:
    return ["--data.init_args.cache_dir=/proc/nowhere"], "/proc/nowhere"


def unknown_metric(run: Path) -> tuple[list[str], str]:
    stopping = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping"
    return [
        stopping,
        "--trainer.callbacks.monitor=val/los",
    ], "EarlyStopping(monitor='val/los'): validation logs no such"


def no_validation(run: Path) -> tuple[list[str], str]:
    return ["--data.init_args.validation=null"], "HeldOutLoss needs validation"


def validation_after_the_end(run: Path) -> tuple[list[str], str]:
    stopping = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
        "--trainer.callbacks.monitor=val/loss",
    ]
    return [*stopping, "--trainer.max_steps=2"], "the run ends after 2 batches, and its first validation comes after 3"


def no_checkpoint(run: Path) -> tuple[list[str], str]:
    return ["--ckpt_path="], "--ckpt_path is empty"


def no_interval(run: Path) -> tuple[list[str], str]:
    return ["--trainer.val_check_interval=0"], "trainer.val_check_interval is 0, but must be above 0"


def too_short_a_schedule(run: Path) -> tuple[list[str], str]:
    schedule = ["--model.init_args.lr_scheduler=torch.optim.lr_scheduler.OneCycleLR"]
    schedule += ["--model.init_args.lr_scheduler.max_lr=0.1", "--model.init_args.lr_scheduler.total_steps=2"]
    return schedule, "OneCycleLR is planned for 2 steps, and the run takes 3"


def another_optimizer(run: Path) -> tuple[list[str], str]:
    optimizer = ["--model.init_args.optimizer=torch.optim.SGD", "--model.init_args.optimizer.lr=0.1"]
    return [*optimizer, "--ckpt_path=last"], "was saved by a run with AdamW, and this one has SGD"


@pytest.mark.parametrize(
    "case",
    [
        directory_of_checkpoints,
        sharded_checkpoint,
        existing_version,
        missing_package,
        missing_device,
        negative_learning_rate,
        rare_validation,
        unwritable_cache,
        unknown_metric,
        no_validation,
        validation_after_the_end,
        no_checkpoint,
        no_interval,
        too_short_a_schedule,
        another_optimizer,
    ],
)
def test_what_would_fail_late_is_told_before_training_in_one_message(
    case: Callable[[Path], tuple[list[str], str]], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(finished, tmp_path)
    overrides, complaint = case(run)
    unreached = ["--trainer.callbacks+=tests.test_run_control.NoTraining"]
    first = [*overrides, *unreached] if case in AFTER_A_CALLBACK else [*unreached, *overrides]
    code, message = failure(["fit", *DEBUG, *output_to(run), *SHORT, *first], capsys)
    assert code == 2
    assert complaint in message
    assert "Traceback" not in message
    with pytest.raises(PaCAError):
        main(["fit", *DEBUG, *output_to(run), *SHORT, *first, "--debug"])


AFTER_A_CALLBACK = (unknown_metric, validation_after_the_end)
"""Cases whose settings belong to the last callback."""


class NoTraining(Callback):
    """Fails where training begins."""

    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("training began")


class OfTheUser(Callback):
    """Has a bug."""

    def on_train_start(self, *_: Any) -> None:
        raise ValueError("a bug")


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug") as error:
        main(["fit", *DEBUG, *output_to(tmp_path), "--trainer.callbacks+=tests.test_run_control.OfTheUser"])
    assert not isinstance(error.value, PaCAError)


def test_a_run_that_fails_early_leaves_no_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(["fit", *DEBUG, *output_to(tmp_path), "--data.init_args.train=nowhere.jsonl"], capsys)[0] == 2
    assert not (tmp_path / "version_0").exists()


def test_runs_that_start_at_once_get_versions_of_their_own(tmp_path: Path) -> None:
    trainers = [Trainer(logger=CSVLogger(tmp_path, name=None), accelerator="cpu") for _ in range(8)]
    start = threading.Barrier(len(trainers))

    def claim(trainer: Trainer) -> None:
        assert trainer.logger is not None
        start.wait()
        claim_versions(trainer)

    threads = [threading.Thread(target=claim, args=(trainer,)) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(trainer.loggers[0].version for trainer in trainers) == list(range(8))


@pytest.mark.parametrize(
    ("arguments", "complaint", "help_line"),
    [
        (["fit", *DEBUG, "--trainer.max_stepz=3"], "unrecognized arguments: --trainer.max_stepz=3", "fit"),
        (["fit", *DEBUG, "--ckpt=last"], "unrecognized arguments: --ckpt=last", "fit"),
        (["fit", *DEBUG, "--model.init_args.optimizer.lrr=1"], "Option 'lrr' is not accepted", "fit"),
        (["fit", *DEBUG, "--trainer.max_steps=abc"], "Expected a <class 'int'>. Got value: abc", "fit"),
        (["fit", *DEBUG, "--model.init_args.dtypo=3"], "Option 'dtypo' is not accepted", "fit"),
        (["validate", "--config=nowhere.yaml"], "File does not exist: ", "validate"),
        (["data", *DEBUG, "--datta.x=1"], "unrecognized arguments: --datta.x=1", "data"),
        (["data", *DEBUG, "--samples=few"], "argument --samples: invalid int value: 'few'", "data"),
        (["estimate", *DEBUG, "--tokens=many"], "argument --tokens: invalid int value: 'many'", "estimate"),
        (["estimate", *DEBUG, "--datta.x=1"], "unrecognized arguments: --datta.x=1", "estimate"),
        (["generate", "--model=x", "--frob=1"], "unrecognized arguments: --frob=1", "generate"),
        (
            ["generate", "--model=x", "--seed=few"],
            "Expected a <class 'int'> or <class 'NoneType'>. Got value: few",
            "generate",
        ),
        (["export", "--model=x", "--adapter=y"], "output", "export"),
        (["bench", "--steps=few"], "Expected a <class 'int'>. Got value: few", "bench"),
    ],
)
def test_a_mistyped_option_is_answered_by_its_message_and_one_line_of_help(
    arguments: list[str], complaint: str, help_line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert complaint in "\n".join(lines)
    assert lines[-1] == f"paca-lightning {help_line} --help lists the options."
    assert "usage:" not in "\n".join(lines)
    assert len(lines) < 8


@contextmanager
def endless_run(
    directory: Path, *overrides: str, terminal: int | None = None, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A run of the command line that has taken its first step and does not end by itself.

    Args:
        directory: Of its files.
        *overrides: Of its config.
        terminal: Where its output is read, if it writes to a terminal.
        **options: For the process.
    """
    command = [sys.executable, "-m", "paca_lightning.cli", "fit", *DEBUG, *output_to(directory), *overrides]
    command += ["--trainer.max_epochs=100000", "--trainer.log_every_n_steps=1"]
    with started([*command, "--trainer.logger.flush_logs_every_n_steps=1"], cwd=ROOT, **options) as process:
        deadline = time.monotonic() + HANG
        metrics = directory / "version_0" / "metrics.csv"
        while not metrics.exists() or not logged(directory / "version_0", "train/loss"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
            if terminal is not None:
                with suppress(BlockingIOError):
                    os.read(terminal, 1 << 20)
        yield process


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "a closed terminal"])
def test_a_command_that_is_stopped_keeps_what_was_trained(how: str, tmp_path: Path) -> None:
    if how == "SIGTERM":
        with endless_run(tmp_path) as process:
            process.send_signal(signal.SIGTERM)
            assert process.wait(HANG) == 143
    else:
        ours, its = os.openpty()
        os.set_blocking(ours, False)
        options = {"stdin": its, "stdout": its, "stderr": its, "preexec_fn": become_owner_of_terminal}
        with endless_run(tmp_path, terminal=ours, **options) as process:
            os.close(its)
            os.close(ours)
            assert process.wait(HANG) == 129
    assert len(trained_layers(tmp_path / "version_0" / "adapter")) == 14
    assert (tmp_path / "version_0" / "checkpoints" / "interrupted.ckpt").exists()


def become_owner_of_terminal() -> None:
    """Make stdin the terminal that this session gets SIGHUP from, and heed it also where the tests run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.slow
def test_slurms_signal_requeues_a_command_which_goes_on_until_it_is_ended(tmp_path: Path) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n')
    scontrol.chmod(stat.S_IRWXU)
    job = {"NTASKS": "1", "JOB_ID": "77", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    environment = os.environ | {f"SLURM_{name}": value for name, value in job.items()}
    environment["PATH"] = f"{scontrol.parent}:{environment['PATH']}"
    with endless_run(tmp_path / "run", env=environment) as process:
        process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + HANG
        while not (tmp_path / "scontrol.log").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert (tmp_path / "run" / "hpc_ckpt_1.ckpt").exists()
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG) == 143
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
