"""The same seed, the same bytes: two runs of the command line write adapters that do not differ in a bit."""

import sys
from pathlib import Path

import pytest

from paca_lightning.cli import main
from tests.distributed_launch import launch

ROOT = Path(__file__).parents[2]
WORKERS = (0, 2)


def fit(directory: Path, ranks: int) -> None:
    """Train two steps of packed, shuffled data for each number of workers, each in a directory of its own."""
    for number, workers in enumerate(WORKERS):
        output = directory / str(number)
        main(
            [
                "fit",
                f"--config={ROOT / 'configs' / 'debug.yaml'}",
                f"--trainer.default_root_dir={output}",
                f"--trainer.logger.init_args.save_dir={output}",
                "--trainer.callbacks=PaCAStrategy",
                "--trainer.callbacks.config.r=4",
                "--trainer.callbacks+=AdapterCheckpoint",
                f"--trainer.callbacks.dirpath={output / 'adapter'}",
                "--trainer.accelerator=cpu",
                f"--trainer.devices={ranks}",
                f"--trainer.strategy={'ddp' if ranks > 1 else 'auto'}",
                "--trainer.max_steps=2",
                "--trainer.limit_val_batches=0",
                "--data.init_args.batch_size=2",
                "--data.init_args.packing=true",
                f"--data.init_args.num_workers={workers}",
            ]
        )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_runs_of_one_seed_write_the_same_bytes(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["paca-lightning"])
    if ranks == 1:
        fit(tmp_path, ranks)
    else:
        launch(fit, ranks, tmp_path, ranks)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / str(number) / "adapter").iterdir()} for number in (0, 1)
    )
    assert {"adapter_config.json", "adapter_model.safetensors", "paca_lightning.json"} <= first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
