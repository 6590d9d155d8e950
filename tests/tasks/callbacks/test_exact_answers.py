"""ExactAnswers: an answer counts when each of its tokens is the model's first choice."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks import CausalLMModule, ExactAnswers, InstructionDataModule
from paca_lightning.tasks.callbacks.exact_answers import exact_rows
from tests.tiny import tiny_model_directory


def logits_of(predictions: list[list[int]]) -> torch.Tensor:
    """Logits whose first choices are these, shape (B, T, 5)."""
    return torch.nn.functional.one_hot(torch.tensor(predictions), 5).float()


def test_a_row_is_right_if_all_its_trained_tokens_are() -> None:
    labels = torch.tensor([[-100, 1, 2, 3], [-100, 1, 2, 3], [-100, -100, 2, -100], [-100, -100, -100, -100]])
    predicted = logits_of([[1, 2, 3, 0], [1, 4, 3, 0], [4, 2, 4, 4], [0, 0, 0, 0]])  # each position predicts the next
    right, counted = exact_rows(predicted, labels)
    assert right[:3].tolist() == [True, False, True]
    assert counted.tolist() == [True, True, True, False]


def run(directory: Path, steps: int, *, packing: bool = False) -> float:
    """The accuracy after so many steps on three questions, one answer."""
    rows = directory / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"instruction": f"Say {n}.", "output": "yes"}) for n in range(3)))
    model = str(tiny_model_directory(directory / "model"))
    data = InstructionDataModule(model, str(rows), str(rows), batch_size=2, max_length=128, packing=packing)
    module = CausalLMModule(model, optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExactAnswers()],
    )
    trainer.fit(module, datamodule=data)
    return float(trainer.callback_metrics["val/accuracy"])


@pytest.mark.parametrize(("steps", "share"), [(2, 0), (30, 1)])
def test_validation_logs_the_share_of_right_rows(steps: int, share: float, tmp_path: Path) -> None:
    assert run(tmp_path, steps) == share


def test_packed_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match="packing: false"):
        run(tmp_path, 2, packing=True)
