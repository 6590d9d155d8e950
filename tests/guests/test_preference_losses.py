"""Losses of PreferenceModule against those of TRL's trainers, on the same batch and the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paca_lightning import PaCAConfig, apply_paca, disable_paca, merge, paca_layers, write_columns
from paca_lightning.tasks import PreferenceModule
from tests.tasks.preferences import preference_batch
from tests.tasks.test_preference_losses import rows_of
from tests.tiny import tiny_llama, tiny_tokenizer

trl = pytest.importorskip("trl")
pytestmark = [
    pytest.mark.guests,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning"),
]


def moved() -> Any:
    """A tiny Llama with trained columns that moved far."""
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=8))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, layer in paca_layers(model):
            layer.paca_delta.copy_(torch.randn(layer.paca_delta.shape, generator=generator) * 0.3)
    write_columns(model)
    return model


def ours(batch: dict[str, Tensor], loss: str, **settings: Any) -> Tensor:
    module = PreferenceModule("tiny", loss=loss, **settings)
    module.model = moved()
    module.reference.context = lambda: disable_paca(module)
    total, count = module.summed_loss(batch)
    assert module.loss.fused
    return total / count


def arguments(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    return {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False, **settings}


def dataset(**columns: list[Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": ["Why?", "How?"], **columns})


PAIRS = {"chosen": [" So.", " Thus."], "rejected": [" Dog.", " Cat."]}


def as_theirs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "completion_mask": (batch["labels"] != -100).long(),
    }


@pytest.mark.parametrize(("loss", "loss_type"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_dpo_and_ipo(loss: str, loss_type: str, tmp_path: Path) -> None:
    batch, beta = preference_batch(), 0.3
    trainer = trl.DPOTrainer(
        model=merge(moved()),
        ref_model=tiny_llama(),
        args=trl.DPOConfig(**arguments(tmp_path, beta=beta, loss_type=[loss_type])),
        train_dataset=dataset(**PAIRS),
        processing_class=tiny_tokenizer(),
    )
    expected = trainer.compute_loss(trainer.model, as_theirs(batch))
    assert expected.item() > 0.1
    torch.testing.assert_close(ours(batch, loss, beta=beta), expected, rtol=1e-5, atol=1e-5)


def sides(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch as TRL's older trainers take it."""
    found = {}
    for name, side in (("chosen", slice(0, 3)), ("rejected", slice(3, 6))):
        for key in ("input_ids", "attention_mask", "labels"):
            found[f"{name}_{key}"] = batch[key][side]
    return found


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_simpo_and_orpo(loss: str, tmp_path: Path) -> None:
    batch = preference_batch()
    if loss == "simpo":
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer

        theirs = {"beta": 1.5, "loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0, "label_smoothing": 0.1}
        settings = {"beta": 1.5, "gamma": 0.7, "label_smoothing": 0.1}
    else:
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer

        theirs = settings = {"beta": 0.4}
    trainer = Trainer(
        model=merge(moved()),
        args=Config(**arguments(tmp_path, max_length=64, **theirs)),
        train_dataset=dataset(**PAIRS),
        processing_class=tiny_tokenizer(),
    )
    expected, _ = trainer.get_batch_loss_metrics(trainer.model, sides(batch))
    torch.testing.assert_close(ours(batch, loss, **settings), expected, rtol=1e-5, atol=1e-5)


def test_kto(tmp_path: Path) -> None:
    batch = preference_batch(labelled=True)
    trainer = trl.KTOTrainer(
        model=merge(moved()),
        ref_model=tiny_llama(),
        args=trl.KTOConfig(**arguments(tmp_path, beta=0.3, desirable_weight=1.5, per_device_train_batch_size=2)),
        train_dataset=dataset(completion=PAIRS["chosen"], label=[True, False]),
        processing_class=tiny_tokenizer(),
    )
    own = {name: tensor[:3] for name, tensor in as_theirs(batch).items()}
    strange = {f"KL_{name}": tensor[3:] for name, tensor in as_theirs(batch).items()}
    expected = trainer.compute_loss(trainer.model, {**own, **strange, "label": batch["good"]})
    divergences = rows_of(moved(), batch) - rows_of(tiny_llama(), batch)
    assert divergences[3:].mean() > 0.1  # not clamped
    torch.testing.assert_close(ours(batch, "kto", beta=0.3, desirable_weight=1.5), expected, rtol=1e-5, atol=1e-5)
