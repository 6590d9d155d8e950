"""Losses of preferences against the equations of their papers, written plainly, and the settings that are refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.loss import CausalLMLoss
from paca_lightning.tasks.preference_losses import Answers, PreferenceLoss
from tests.tasks.preferences import preference_batch
from tests.tiny import tiny_llama

CHOSEN = Answers(torch.tensor([-3.0, -8.0]), torch.tensor([4, 5]), torch.tensor([-4.0, -7.5]))
REJECTED = Answers(torch.tensor([-6.0, -2.0]), torch.tensor([3, 2]), torch.tensor([-5.0, -2.5]))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def plain(name: str, pair: int) -> float:
    """One pair's loss: beta 0.3, gamma 0.7, one label in ten wrong."""
    yw, yl = CHOSEN.log_probs[pair].item(), REJECTED.log_probs[pair].item()
    nw, nl = int(CHOSEN.tokens[pair]), int(REJECTED.tokens[pair])
    rw, rl = yw - CHOSEN.reference[pair].item(), yl - REJECTED.reference[pair].item()  # type: ignore[index]
    if name == "dpo":
        z = 0.3 * (rw - rl)
        return -0.9 * math.log(sigmoid(z)) - 0.1 * math.log(sigmoid(-z))
    if name == "ipo":
        return (rw / nw - rl / nl - 1 / (2 * 0.3)) ** 2
    if name == "simpo":
        z = 0.3 / nw * yw - 0.3 / nl * yl - 0.7
        return -0.9 * math.log(sigmoid(z)) - 0.1 * math.log(sigmoid(-z))
    odds = [math.exp(y / n) / (1 - math.exp(y / n)) for y, n in ((yw, nw), (yl, nl))]
    return -0.3 * math.log(sigmoid(math.log(odds[0] / odds[1])))


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "orpo"])
def test_losses_of_pairs_are_those_of_the_papers(name: Any) -> None:
    smoothing = {"label_smoothing": 0.1} if name in ("dpo", "simpo") else {}
    margin = {"gamma": 0.7} if name == "simpo" else {}
    judged = PreferenceLoss(name, 0.3, **smoothing, **margin).of_pairs(CHOSEN, REJECTED)
    torch.testing.assert_close(judged.losses, torch.tensor([plain(name, 0), plain(name, 1)]))


def test_loss_of_labels_is_that_of_the_paper() -> None:
    judged = PreferenceLoss("kto", 0.3, desirable_weight=1.2).of_rows(
        CHOSEN, torch.tensor([True, False]), torch.tensor(0.4)
    )
    good, bad = 1.2 * (1 - sigmoid(0.3 * (1.0 - 0.4))), 1 - sigmoid(0.3 * (0.4 + 0.5))
    torch.testing.assert_close(judged.losses, torch.tensor([good, bad]))
    torch.testing.assert_close(judged.rewards, torch.tensor([0.3, -0.15]))


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "orpo"])
def test_a_row_without_an_answer_has_finite_gradients(name: Any) -> None:
    log_probs = torch.zeros(2, requires_grad=True)
    empty = Answers(log_probs, torch.zeros(2, dtype=torch.int64), torch.zeros(2))
    PreferenceLoss(name).of_pairs(empty, empty).losses.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ppo"}, "loss='ppo' is unknown"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5"),
        ({"gamma": 1.0}, "loss: dpo has no gamma, which simpo use"),
        ({"name": "ipo", "label_smoothing": 0.1}, "loss: ipo has no label_smoothing, which dpo and simpo use"),
        ({"desirable_weight": 2.0}, "loss: dpo has no desirable_weight"),
        ({"name": "kto", "undesirable_weight": 0.0}, "must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        PreferenceLoss(**settings)


def rows_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Summed log-probabilities from full logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    labels = batch["labels"][:, 1:]
    found = logits[:, :-1].gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (found * (labels != -100)).sum(1)


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
def test_log_probabilities_of_rows_and_their_gradients_are_those_of_full_logits(
    chunk: int | None, trained_head: bool
) -> None:
    model, reference, batch = tiny_llama(), tiny_llama(), preference_batch()
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0])
    for one in (model, reference):
        one.lm_head.requires_grad_(trained_head)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    loss = CausalLMLoss(chunk)
    losses, tokens = loss.of_rows(model, inputs, batch["labels"])
    assert loss.fused
    assert tokens.tolist() == [12, 5, 6, 4, 10, 9]
    expected = rows_of(reference, batch)
    torch.testing.assert_close(-losses, expected)
    (-losses @ weights).backward()
    (expected @ weights).backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
