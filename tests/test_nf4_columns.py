"""What unquantized columns give back: the script's losses are those of the models it names."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from scripts.nf4_columns import batches, labelled, loss, losses
from tests.tiny import tiny_model_directory
from tests.tools.compare.tasks import DEBUG


@pytest.fixture
def arguments(tmp_path: Path) -> Namespace:
    """A tiny model whose layers all have 64 input columns, on the rows of the debug config."""
    model = tiny_model_directory(tmp_path / "model", vocab_size=512, intermediate_size=64)
    return Namespace(model=model, text=Path(DEBUG), ranks=[4, 64], blocks=8, dtype="float32")


def test_all_columns_unquantized_are_the_model_itself(arguments: Namespace) -> None:
    found = dict(losses(arguments))
    assert found["random, r=64"] == pytest.approx(found["float32"], abs=1e-5)
    assert found["plain NF4"] != pytest.approx(found["float32"], abs=1e-5)
    assert found["output_error, r=4"] not in (found["plain NF4"], found["float32"], found["random, r=4"])


def test_the_loss_is_the_mean_over_tokens_with_a_label(arguments: Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    held_out, calibration = batches(arguments)
    assert len(calibration) == 8
    with torch.no_grad():
        wanted = [batch["labels"][:, 1:] for batch in held_out]
        logits = [model(**batch).logits[:, :-1] for batch in held_out]
    each = torch.cat(
        [a[b != -100].log_softmax(-1).gather(1, b[b != -100, None]) for a, b in zip(logits, wanted, strict=True)]
    )
    assert loss(model, held_out) == pytest.approx(-float(each.mean()), rel=1e-5)


def test_text_is_labelled_throughout() -> None:
    ids = torch.arange(24).view(6, 4)
    first, second = labelled(ids)
    assert torch.equal(torch.cat([first["labels"], second["labels"]]), ids)
