"""Proves the project on a GPU, stage by stage: its tests, the paper's comparison, small steps. `make gpu` runs this.

    python -m scripts.gpu                    # what is not done yet for this commit
    python -m scripts.gpu --output out/gpu   # where results go: one folder a stage, results.json, results.md

A stage is a command with a limit of its own. Its result is kept as soon as it ends, so what is cut off later loses
nothing, and the next call goes on there. After a commit, all stages run again.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from paca_lightning.tools.environment import describe_environment
from scripts.performance_tables import Run, bench_table

PYTHON = sys.executable
BENCH = [PYTHON, "-m", "paca_lightning.cli", "bench"]


@dataclass(frozen=True)
class Stage:
    """A part of the proof.

    Attributes:
        name: Of its folder.
        command: ``{folder}`` stands for the folder.
        limit: Seconds after which it is cut off. All together leave time to install within ten minutes.
    """

    name: str
    command: tuple[str, ...]
    limit: int


STAGES = (
    Stage(
        "tests",
        (PYTHON, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "gpu", "tests/gpu", "--junitxml", "{folder}/tests.xml"),
        180,
    ),
    Stage(
        "small-512",
        (*BENCH, "--preset", "small", "--batch", "2", "--tokens", "512", "--output", "{folder}"),
        45,
    ),
    Stage(
        "small-128",
        (*BENCH, "--preset", "small", "--batch", "1", "--tokens", "128", "--steps", "60", "--output", "{folder}"),
        45,
    ),
    Stage("paper", (*BENCH, "--preset", "paper", "--steps", "5", "--output", "{folder}"), 180),
)


@dataclass(frozen=True)
class Result:
    """How a stage ended.

    Attributes:
        stage: Its name.
        commit: What was tested.
        code: Exit code; None: cut off at its limit.
        seconds: How long it took.
        last_lines: Of its output.
    """

    stage: str
    commit: str
    code: int | None
    seconds: float
    last_lines: list[str]


def missing_for_gpu() -> str | None:
    """What a run on a GPU lacks here, in one line; None if nothing."""
    import torch

    if shutil.which("nvidia-smi") is None:
        return "there is no NVIDIA driver (nvidia-smi was not found)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "the driver is there, but torch finds no CUDA device"
    return None


def run_stages(stages: Sequence[Stage], output: Path, commit: str) -> list[Result]:
    """Run the stages that this commit has no complete result of, and rewrite the report after each.

    Args:
        stages: In order.
        output: Folder of the results.
        commit: What is tested. Results of others are dropped.

    Returns:
        The results of all stages, old and new.
    """
    results = []
    for stage in stages:
        folder = output / stage.name
        result = kept_result(folder, commit)
        if result is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            print(f"{stage.name}: at most {stage.limit} s", flush=True)
            result = run_stage(stage, folder, commit)
            (folder / "result.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
        print(f"{stage.name}: {outcome(result)}", flush=True)
        results.append(result)
        write_report(results, output)
    return results


def kept_result(folder: Path, commit: str) -> Result | None:
    """The result of an earlier call, if it is of this commit and was not cut off."""
    file = folder / "result.json"
    if not file.exists():
        return None
    result = Result(**json.loads(file.read_text()))
    return result if result.commit == commit and result.code is not None else None


def run_stage(stage: Stage, folder: Path, commit: str) -> Result:
    """Run a stage; its output goes to ``output.txt``."""
    command = [part.replace("{folder}", str(folder)) for part in stage.command]
    begin = time.monotonic()
    log = folder / "output.txt"
    code: int | None = None
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)  # noqa: S603
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(stage.limit)
    with contextlib.suppress(ProcessLookupError):  # whatever it started ends with it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    lines = log.read_text(errors="replace").splitlines()
    return Result(stage.name, commit, code, round(time.monotonic() - begin, 1), lines[-12:])


def outcome(result: Result) -> str:
    """How a stage ended, in words."""
    how = {0: "passed", None: "cut off"}.get(result.code, f"failed with exit code {result.code}")
    return f"{how} after {result.seconds:.0f} s"


def write_report(results: Sequence[Result], output: Path) -> None:
    """Write ``results.json`` and ``results.md``: device, versions, how each stage ended, and its figures."""
    machine = describe_environment() | {"device": device_name()}
    figures = {result.stage: benchmarks(output / result.stage) for result in results}
    whole = {"machine": machine, "results": [asdict(result) for result in results], "figures": figures}
    (output / "results.json").write_text(json.dumps(whole, indent=2) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = [f"# {machine['device']}, {machine['date']}", "", versions, "", "| stage | outcome |", "| --- | --- |"]
    lines += [f"| {result.stage} | {outcome(result)} |" for result in results]
    for stage, runs in figures.items():
        if runs:
            lines += ["", f"## {stage}", "", bench_table(runs)]
    (output / "results.md").write_text("\n".join(lines) + "\n")


def benchmarks(folder: Path) -> list[Run]:
    """Every bench.json in a stage's folder, under the name of what it measured."""
    found = [json.loads(file.read_text()) for file in sorted(folder.rglob("bench.json"))]
    return [{**run, "label": run["setup"]["title"]} for run in found]


def device_name() -> str:
    """The GPU, or that there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def main() -> None:
    """Run what is not done yet. Exit code 1 if there is no GPU, or a stage failed or was cut off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), help="folder of the results (out/gpu)")
    output = parser.parse_args().output
    if missing := missing_for_gpu():
        sys.exit(f"make gpu: {missing}.")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S607
    output.mkdir(parents=True, exist_ok=True)
    results = run_stages(STAGES, output, commit)
    print(output / "results.md")
    sys.exit(int(any(result.code != 0 for result in results)))


if __name__ == "__main__":
    main()
