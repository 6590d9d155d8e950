"""Kills runs of the command line at chosen and at random moments, resumes them, and compares the ends bit by bit.

    python -m tests.reliability.killed_runs --kills 50 --cases single,nf4,ddp,fsdp2

Runs are forked from one process that has the imports done. The kills are in file operations that ``faulty_disk.c``
counts, so that they do not depend on the machine's speed, and, with ``--random``, anywhere.
"""

import argparse
import ctypes
import importlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file

from paca_lightning.adapters.files import TENSORS
from paca_lightning.adapters.saved import adapter_layers, saved_config
from paca_lightning.core.checkpoints import METADATA
from tests.processes import HANG, kill_group, lead_group, write_output_to

ROOT = Path(__file__).parents[2]
STEPS = 7
"""Checkpoints are of steps 2, 4 and 6, validations after 2, 4 and 6: the run does not end with either."""
NOTES = "KILLED_RUNS_NOTES"
PRELOADED = (
    "bitsandbytes",
    "datasets",
    "paca_lightning.callbacks.adapter_checkpoint",
    "paca_lightning.tools.compare.auto",
    "paca_lightning.tools.run_config",
    "peft",
    "tests.warm_caches",
    "torch._dynamo",
    "torch.distributed.checkpoint.format_utils",
    "transformers.models.llama.modeling_llama",
)
"""What runs would import one by one. None of it computes: autograd's threads do not survive a fork."""


@dataclass(frozen=True)
class Case:
    """A kind of run: how many ranks, and settings of the trainer and of PaCA."""

    ranks: int = 1
    trainer: dict[str, Any] = field(default_factory=dict)
    paca: dict[str, Any] = field(default_factory=dict)


CASES = {
    "single": Case(),
    "nf4": Case(paca={"quantize": "nf4"}),
    "ddp": Case(ranks=2, trainer={"strategy": "ddp"}),
    "fsdp2": Case(ranks=2, trainer={"strategy": "paca_fsdp2"}),
}


def config(case: Case, directory: Path) -> dict[str, Any]:
    """Packing, shuffling, two workers, accumulation, validation, a checkpoint every second step, the best adapter."""
    debug = yaml.safe_load((ROOT / "configs" / "debug.yaml").read_text())
    callbacks = [
        {"class_path": "tests.reliability.killed_runs.NoteStart"},
        {
            "class_path": "paca_lightning.AdapterCheckpoint",
            "init_args": {"monitor": "val/loss", "dirpath": str(directory / "adapter")},
        },
        {"class_path": "paca_lightning.AdapterCheckpoint", "init_args": {"dirpath": str(directory / "last")}},
        {"class_path": "paca_lightning.PaCAStrategy", "init_args": {"config": {"r": 4, **case.paca}}},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(directory / "checkpoints"), "every_n_train_steps": 2, "save_last": True},
        },
    ]
    debug["trainer"] |= {
        "accelerator": "cpu",
        "devices": case.ranks,
        "max_epochs": 100,
        "max_steps": STEPS,
        "accumulate_grad_batches": 2,
        "val_check_interval": 4,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "default_root_dir": str(directory),
        "callbacks": callbacks,
        **case.trainer,
    }
    debug["trainer"]["logger"]["init_args"]["save_dir"] = str(directory / "logs")
    debug["data"]["init_args"] |= {"batch_size": 1, "packing": True, "num_workers": 2, "max_length": 128}
    return debug


class NoteStart(Callback):
    """Notes the step at which training begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            Path(os.environ[NOTES]).write_text(str(trainer.global_step))


def forked(function: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None) -> int:
    """Start a process that calls a function and exits with 0, or 1 after an error. Returns its id."""
    if (process := os.fork()) != 0:
        return process
    code = 1
    try:
        lead_group()
        os.environ |= environment or {}
        function(*arguments)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def answer(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own: this one never computes, so that it can fork."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "result")
        process = forked(lambda: result.write_bytes(pickle.dumps(function(*arguments))))
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        return pickle.loads(result.read_bytes())


def _fit(arguments: list[str], log: Path, count: Path | None) -> None:
    from paca_lightning.cli import main

    write_output_to(log)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    main(arguments)
    if count is not None:
        count.write_text(str(ctypes.CDLL(None).faulty_disk_operations()))


class Killer:
    """Runs of one case in directories below a scratch directory."""

    def __init__(self, case: Case, scratch: Path) -> None:
        self.case, self.scratch = case, scratch

    def start(
        self, directory: Path, *, kill_at: int = 0, killed_rank: int = 0, slow: int = 0, count: Path | None = None
    ) -> list[int]:
        """Start a run that begins anew, or goes on from what is in the directory. Returns its processes."""
        path = self.scratch / f"{directory.name}.yaml"
        path.write_text(yaml.safe_dump(config(self.case, directory)))
        arguments = ["fit", f"--config={path}"]
        if complete_checkpoints(directory):
            arguments.append("--ckpt_path=last")
        port = free_port()
        processes = []
        for rank in range(self.case.ranks):
            environment = {"FAULTY_DISK": str(directory), NOTES: str(self.scratch / "start.txt")}
            environment |= {"FAULTY_DISK_SLOW": str(slow)} if slow else {}
            if kill_at and rank == killed_rank:
                environment["FAULTY_DISK_KILL_AT"] = str(kill_at)
            if self.case.ranks > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(self.case.ranks),
                    "LOCAL_WORLD_SIZE": str(self.case.ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "none",
                }
            log = self.scratch / f"{directory.name}.{rank}.log"
            own_count = count if rank == 0 else None
            processes.append(forked(_fit, arguments, log, own_count, environment=environment))
        return processes

    def run(self, directory: Path, **how: Any) -> list[int]:
        """Run to the end, or to the death of a rank, after which the others are killed too. Returns exit codes."""
        return wait(self.start(directory, **how))

    def log_of(self, directory: Path) -> str:
        """What the ranks of the last run in a directory have printed."""
        return "\n".join(path.read_text() for path in sorted(self.scratch.glob(f"{directory.name}.*.log")))


def wait(processes: list[int]) -> list[int]:
    """Wait for processes; when one fails, kill the others. Returns exit codes, -9 where killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + HANG
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[process] = os.waitstatus_to_exitcode(status)
                    kill_group(process)  # its workers
        if any(codes.values()) or time.monotonic() > deadline:
            for process in processes:
                if process not in codes:
                    kill_group(process)
        time.sleep(0.01)
    return [codes[process] for process in processes]


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def complete_checkpoints(directory: Path) -> list[Path]:
    """What is under a final name of a checkpoint, or has lost it for a moment to the one that takes its place."""
    found = [path for path in (directory / "checkpoints").glob("*.ckpt") if not path.name.startswith(".")]
    return found + list((directory / "checkpoints").glob(".*.replaced"))


def check_whole(directory: Path) -> int:
    """Read everything under a final name, and return the steps of the furthest checkpoint; hidden files are ours.

    Raises:
        Exception: A file is damaged. The logger's metrics.csv and hparams.yaml grow in place, and are not read.
    """
    steps = 0
    for path in complete_checkpoints(directory):
        steps = max(steps, contents_of(path)["global_step"])
    for adapter in (directory / "adapter", directory / "last"):
        if adapter.exists():
            saved_config(adapter)
            adapter_layers(adapter)
    for saved in directory.rglob("config.yaml"):
        assert "trainer" in yaml.safe_load(saved.read_text())
    return steps


def contents_of(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds, of both kinds."""
    if path.is_file():
        return torch.load(path, weights_only=True)
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.NamedTemporaryFile(suffix=".pt") as whole:
        dcp_to_torch_save(path, whole.name)
        rest: dict[str, Any] = torch.load(path / METADATA, weights_only=True)
        return rest | torch.load(whole.name, weights_only=True)


def outcome(directory: Path) -> dict[str, torch.Tensor]:
    """The trained tensors at the end of a run, and those of the best adapter."""
    return {
        f"{name} {key}": tensor
        for name in ("adapter", "last")
        for key, tensor in load_file(directory / name / TENSORS).items()
    }


def states(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoints that a run has left, by step."""
    found = [contents_of(path) for path in complete_checkpoints(directory)]
    return {f"step {one['global_step']}{path}": tensor for one in found for path, tensor in leaves(one)}


def leaves(tree: Any, path: str = "") -> list[tuple[str, torch.Tensor]]:
    """The tensors in nested dictionaries and lists, by their path."""
    if isinstance(tree, torch.Tensor):
        return [(path, tree)]
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [leaf for key, part in parts for leaf in leaves(part, f"{path}/{key}")]


def differing(one: Path, two: Path) -> list[str]:
    """Names of what differs between the ends of two runs, in any bit, and in states of a step that both have saved.

    A resumed run may have saved its last step too: ModelCheckpoint does so if it has saved nothing else.
    """
    first, second = outcome(one), outcome(two)
    assert first.keys() == second.keys()
    assert all(tensor.any() for name, tensor in first.items() if name.endswith("paca_delta"))
    first, second = first | states(one), second | states(two)
    return sorted(name for name in first.keys() & second.keys() if not torch.equal(first[name], second[name]))


@dataclass
class Report:
    """What was done in one case, and what went wrong."""

    case: str
    operations: int = 0
    kills: int = 0
    of_those_random: int = 0
    resumed_from: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def try_case(name: str, kills: int, scratch: Path, *, seed: int = 0, at_random: bool = False) -> Report:
    """Kill runs of a case until there were so many kills, each once to thrice, and end each undisturbed."""
    report, draw = Report(name), random.Random(seed)
    killer = Killer(CASES[name], scratch)
    undisturbed, count = scratch / "undisturbed", scratch / "count.txt"
    began = time.monotonic()
    if any(killer.run(undisturbed, count=count)):
        report.failures.append(f"the undisturbed run failed: {killer.log_of(undisturbed)[-2000:]}")
        return report
    duration = time.monotonic() - began
    report.operations = int(count.read_text())
    trial = 0
    while report.kills < kills:
        directory = scratch / f"trial-{trial}"
        trial += 1
        for _ in range(min(draw.randint(1, 3), kills - report.kills)):
            if at_random and draw.random() < 0.5:
                processes = killer.start(directory, slow=2000)
                time.sleep(draw.uniform(0.1, 1.2) * duration)
                for process in processes:
                    kill_group(process)
                codes = wait(processes)
                report.of_those_random += -signal.SIGKILL in codes
            else:
                at, rank = draw.randint(1, report.operations), draw.randrange(CASES[name].ranks)
                codes = killer.run(directory, kill_at=at, killed_rank=rank)
            if -signal.SIGKILL not in codes:
                if any(codes):
                    report.failures.append(f"{directory.name}: {codes}: {killer.log_of(directory)[-2000:]}")
                break  # the run was over before
            report.kills += 1
            _check_resumable(killer, directory, report)
        _finish(killer, directory, undisturbed, report)
    return report


def _check_resumable(killer: Killer, directory: Path, report: Report) -> None:
    try:
        report.resumed_from.append(answer(check_whole, directory))
    except Exception:
        report.failures.append(
            f"{directory.name}: damaged after kill {report.kills}: {killer.log_of(directory)[-500:]}"
        )


def _finish(killer: Killer, directory: Path, undisturbed: Path, report: Report) -> None:
    """Run to the end, from the furthest checkpoint there is, and compare."""
    furthest, start = answer(check_whole, directory), killer.scratch / "start.txt"
    start.unlink(missing_ok=True)
    if any(killer.run(directory)):
        report.failures.append(f"{directory.name}: not resumed: {killer.log_of(directory)[-2000:]}")
        return
    began = int(start.read_text()) if start.exists() else None
    if began != furthest and furthest < STEPS:
        log = killer.log_of(directory)[-2000:]
        report.failures.append(f"{directory.name}: went on from {began}, not from {furthest}: {log}")
    if different := answer(differing, directory, undisturbed):
        report.failures.append(f"{directory.name}: another end: {len(different)}, {different[:3]}")


def preloaded() -> dict[str, str]:
    """Build the library, and the environment of a process that loads it."""
    source = Path(__file__).with_name("faulty_disk.c")
    library = Path(tempfile.gettempdir(), f"faulty_disk-{os.getuid()}-{source.stat().st_mtime_ns}.so")
    if not library.exists():
        aside = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", aside, source, "-ldl"], check=True)
        aside.rename(library)
    return {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}


def main() -> None:
    """Print a report of each case as a line of JSON. Exit code 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", action="store_true", help="every second kill anywhere, not in a file operation")
    options = parser.parse_args()
    if "faulty_disk" not in os.environ.get("LD_PRELOAD", ""):
        os.execve(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:]], os.environ | preloaded())

    for name in PRELOADED:
        importlib.import_module(name)
    failed = False
    for name in options.cases.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            report = try_case(name, options.kills, Path(scratch), seed=options.seed, at_random=options.random)
        print(json.dumps(asdict(report)), flush=True)
        failed |= bool(report.failures)
    sys.exit(int(failed))


if __name__ == "__main__":
    from tests.reliability import killed_runs  # so that pickled functions and callbacks have their module's name

    killed_runs.main()
