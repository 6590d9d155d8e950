"""Two runs of the command line that start together with one output directory: neither touches a file of the other."""

import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from paca_lightning.cli import main
from paca_lightning.tools import run_version
from tests.distributed_launch import launch
from tests.processes import HANG

ROOT = Path(__file__).parents[2]
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def meet(scratch: Path, name: str) -> None:
    """Wait until both processes are here."""
    (scratch / f"{name}-{os.getpid()}").touch()
    deadline = time.monotonic() + HANG
    while len(list(scratch.glob(f"{name}-*"))) < 2:
        assert time.monotonic() < deadline, f"the other run never came to {name!r}"
        time.sleep(0.01)


def contents(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fit(output: Path, scratch: Path) -> dict[str, Any]:
    """A run of its own, not a rank. It takes the version that both saw free, and returns what it has written."""
    seed = 1 + int(os.environ["RANK"])
    for name in LAUNCHED:
        del os.environ[name]
    os.chdir(ROOT)
    sys.argv = ["paca-lightning"]
    free = run_version.next_version
    seen = []

    def sees_what_the_other_sees(logger: Any) -> int | str:
        seen.append(version := free(logger))
        if len(seen) == 1:
            meet(scratch, "seen")
        return version

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_version, "next_version", sees_what_the_other_sees)
        main(
            [
                "fit",
                "--config=configs/debug.yaml",
                f"--seed_everything={seed}",
                f"--trainer.default_root_dir={output}",
                f"--trainer.logger.init_args.save_dir={output}",
                "--trainer.accelerator=cpu",
                "--trainer.max_steps=2",
                "--trainer.limit_val_batches=1",
            ]
        )
    (own,) = (
        path.parent
        for path in output.glob("*/config.yaml")
        if yaml.safe_load(path.read_text())["seed_everything"] == seed
    )
    written = contents(own)
    meet(scratch, "written")
    return {"seen": seen, "version": own.name, "written": written}


@pytest.mark.distributed
def test_two_runs_that_start_together_write_two_versions(tmp_path: Path) -> None:
    output, scratch = tmp_path / "runs", tmp_path / "scratch"
    scratch.mkdir()
    results = launch(fit, 2, output, scratch)
    assert [result["seen"][0] for result in results] == [0, 0]  # both chose this one, and one was faster
    assert sorted(result["version"] for result in results) == ["version_0", "version_1"]
    assert sorted(path.name for path in output.iterdir()) == ["version_0", "version_1"]
    for result in results:
        assert contents(output / result["version"]) == result["written"]
    first, second = (result["written"] for result in results)
    assert first.keys() == second.keys()
    kinds = {Path(name).suffix for name in first}
    assert {".yaml", ".csv", ".ckpt", ".safetensors", ".json"} <= kinds
    assert first["adapter/adapter_model.safetensors"] != second["adapter/adapter_model.safetensors"]
