"""The loss of each row: right for each, in the order of the data, whatever the batches and processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks import CausalLMModule, InstructionDataModule, RowLosses
from tests.distributed_launch import launch
from tests.tiny import tiny_model_directory

ROWS = [{"instruction": "Say it. " * (i % 3 + 1), "output": f"It is {i}. " * (i + 1)} for i in range(7)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n" + "\n".join(map(json.dumps, ROWS)))
    return tiny_model_directory(tmp_path / "model")


def predict(directory: Path, devices: int = 1, **settings: Any) -> list[dict[str, Any]]:
    rows = str(directory.parent / "rows.jsonl")
    data = InstructionDataModule(str(directory), rows, test=rows, **{"batch_size": 3, "max_length": 128} | settings)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        default_root_dir=directory.parent,
        callbacks=[RowLosses()],
        logger=False,
        enable_progress_bar=False,
    )
    predictions = trainer.predict(CausalLMModule(str(directory)), datamodule=data)
    assert predictions is not None
    for prediction in predictions:  # never logits
        assert {name: tensor.ndim for name, tensor in prediction.items()} == {"loss": 1, "tokens": 1}
    return [json.loads(line) for line in (directory.parent / "row_losses.jsonl").read_text().splitlines()]


def test_each_line_holds_the_loss_of_its_row(directory: Path) -> None:
    lines = predict(directory)
    assert [line["row"] for line in lines] == list(range(2, 9))  # lines of the file, whose first is empty
    assert {line["file"] for line in lines} == {str(directory.parent / "rows.jsonl")}

    data = InstructionDataModule(str(directory), str(directory.parent / "rows.jsonl"), max_length=128)
    data.setup("fit")
    model = AutoModelForCausalLM.from_pretrained(directory)
    for line, sample in zip(lines, data.splits["train"].dataset, strict=True):
        ids, trained = torch.tensor([sample["input_ids"]]), torch.tensor([sample["trained"]])
        with torch.no_grad():
            expected = model(input_ids=ids, labels=ids.masked_fill(~trained, -100)).loss.item()
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert line["tokens"] == sample["trained_length"]


@pytest.mark.distributed
def test_several_processes_write_each_row_once_into_one_file(directory: Path) -> None:
    alone = predict(directory)
    together, _ = launch(predict_one_by_one, 2, directory)
    assert len(together) == len(ROWS)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == theirs | {"loss": pytest.approx(theirs["loss"], rel=1e-5)}


def predict_one_by_one(directory: Path) -> list[dict[str, Any]]:
    """Seven rows for two ranks: in the last step one of them has none of its own."""
    return predict(directory, devices=2, batch_size=1)


def test_packed_rows_and_other_data_are_refused(directory: Path) -> None:
    with pytest.raises(PaCAError, match="packed rows are several in one: set packing: false"):
        predict(directory, packing=True)
    trainer = Trainer(accelerator="cpu", callbacks=[RowLosses()], logger=False, enable_progress_bar=False)
    loader = DataLoader([{"input_ids": torch.arange(5)[None]}], batch_size=None)
    with pytest.raises(PaCAError, match="RowLosses knows the rows of an InstructionDataModule alone"):
        trainer.predict(CausalLMModule(str(directory)), loader)
    with pytest.raises(PaCAError, match="what a CausalLMModule predicts, and this is a BoringModel"):
        trainer.predict(BoringModel(), loader)
