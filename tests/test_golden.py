"""Losses of a tiny Llama's first steps with PaCA, kept in tests/golden/llama.json.

``python -m tests.test_golden --write`` computes them anew; do that only where a change of training is meant.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from paca_lightning import PaCAConfig, PaCAStrategy
from paca_lightning.tasks import CausalLMModule, InstructionDataModule

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "llama.json"
STEPS = 20
CONFIG = PaCAConfig(r=8, alpha=16)

# Kernels of other CPUs sum in another order: those of SSE4.2 instead of AVX-512 (ATEN_CPU_CAPABILITY=default,
# MKL_ENABLE_INSTRUCTIONS=SSE4_2) move the losses by 2e-7 of their value, a second thread by 1e-7,
# and a scaling off by 1% by 2.3e-4.
TOLERANCE = 5e-5


class Losses(Callback):
    """Notes the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(outputs["loss"].item())


def losses(directory: Path, config: PaCAConfig = CONFIG) -> list[float]:
    """Training losses of the shipped tiny Llama, with random weights of seed 0, on the quickstart's conversations."""
    seed_everything(0, verbose=False)
    noted = Losses()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[PaCAStrategy(config), noted],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
    )
    model = CausalLMModule(
        str(ROOT / "configs" / "tiny-llama"),
        dtype="float32",
        pretrained=False,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0),
    )
    data = InstructionDataModule(
        tokenizer=str(ROOT / "configs" / "tiny-llama"),
        train=str(ROOT / "configs" / "data" / "quickstart" / "train.jsonl"),
        max_length=128,
        batch_size=4,
        cache_dir=str(directory / "cache"),
    )
    trainer.fit(model, data)
    return noted.values


def test_losses_are_the_golden_ones(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert losses(tmp_path) == pytest.approx(golden["losses"], rel=TOLERANCE)
    assert golden["losses"][-1] < 0.95 * golden["losses"][0]


@pytest.mark.parametrize(
    "wrong", [{"alpha": 16.16}, {"seed": 1}, {"r": 9, "alpha": 18}], ids=["scaling off by 1%", "other columns", "r 9"]
)
def test_the_tolerance_catches_wrong_training(tmp_path: Path, wrong: dict[str, Any]) -> None:
    golden = json.loads(GOLDEN.read_text())["losses"]
    settings = CONFIG.to_dict() | wrong
    assert losses(tmp_path, PaCAConfig(**settings)) != pytest.approx(golden, rel=TOLERANCE)


def write() -> None:
    """Compute the golden losses and write them."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as directory:
        values = losses(Path(directory))
    about = f"python -m tests.test_golden --write, torch {torch.__version__}"
    GOLDEN.write_text(json.dumps({"written_by": about, "losses": values}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.test_golden --write")
    write()
