"""LoReFT equals a plain reading of its paper's equation at the prompt's positions, gradients and steps."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paca_lightning.core.errors import PaCAError
from paca_lightning.other_methods.loreft import LowRankEdit, insert_loreft, orthonormal_rows
from paca_lightning.other_methods.prompt_positions import positions_of, prompts_of
from paca_lightning.tasks.decoder_blocks import checkpoint_activations
from tests.other_methods.plain_llama import plain_logits
from tests.tiny import tiny_llama

TOKENS = torch.randint(3, 384, (12, 14), generator=torch.Generator().manual_seed(0))
LENGTHS = [9, 6, 3]  # of the prompts


def batches() -> list[dict[str, Tensor]]:
    """Rows of 3 with prompts of different lengths."""
    result = []
    for ids in TOKENS.split(3):
        labels = ids.clone()
        for row, length in zip(labels, LENGTHS, strict=True):
            row[:length] = -100
        result.append({"input_ids": ids, "labels": labels})
    return result


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def edited_tokens(length: int) -> tuple[list[int], list[int]]:
    """The first two and the last three tokens of a prompt; of a short one at most half from each end."""
    return list(range(min(2, length // 2))), list(range(length - min(3, length // 2), length))


def gram_schmidt(matrix: Tensor) -> Tensor:
    rows: list[Tensor] = []
    for row in matrix:
        rest = row
        for other in rows:
            rest = rest - (rest @ other) * other
        rows.append(rest / rest.norm())
    return torch.stack(rows)


def by_the_equation(model: Any, weights: dict[str, Tensor], ids: Tensor, *, tied: bool) -> Tensor:
    """``h + R^T (W h + b - R h)``, token by token."""

    def edited(number: int, hidden: Tensor) -> Tensor:
        if number != 0:
            return hidden
        rows = []
        for states, length in zip(hidden, LENGTHS, strict=True):
            tokens = list(states)
            for which, positions in enumerate(edited_tokens(length)):
                prefix = f"model.layers.0.loreft.edits.{0 if tied else which}."
                w, b = weights[prefix + "weight"], weights[prefix + "bias"]
                r = gram_schmidt(weights[prefix + "rotation"])
                for position in positions:
                    h = tokens[position]
                    tokens[position] = h + r.T @ (w @ h + b - r @ h)
            rows.append(torch.stack(tokens))
        return torch.stack(rows)

    return plain_logits(model, ids, after_block=edited)


@pytest.mark.parametrize("tied", [False, True])
def test_equal_to_the_papers_equation_over_several_steps(tied: bool) -> None:
    torch.manual_seed(0)
    model, plain = tiny_llama(), tiny_llama().requires_grad_(False)
    adapted = insert_loreft(model, rank=3, first=2, last=3, layers=[-2], tied=tied)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(own) == (3 if tied else 6)
    theirs = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    optimizers = [torch.optim.AdamW(p.values(), lr=1e-2) for p in (own, theirs)]
    for batch in batches():
        adapted.positions.tell(prompts_of(batch))
        loss_of(model(input_ids=batch["input_ids"], use_cache=False).logits, batch["labels"]).backward()
        loss_of(by_the_equation(plain, theirs, batch["input_ids"], tied=tied), batch["labels"]).backward()
        for name, parameter in own.items():
            assert parameter.grad is not None
            assert parameter.grad.any()
            # Sums in another order; the plain reading orthonormalizes row by row.
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-3, atol=1e-4)


def test_begins_as_the_base_model_bitwise_and_rows_stay_orthonormal() -> None:
    edit = LowRankEdit(32, 4)
    hidden = torch.randn(2, 5, 32)
    assert not edit(hidden).any()
    with torch.no_grad():
        edit.rotation.mul_(0.3).add_(torch.randn_like(edit.rotation))  # as weight decay and steps do
    rotation = orthonormal_rows(edit.rotation)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(rotation, gram_schmidt(edit.rotation), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "first", "last", "expected"),
    [
        (9, 2, 3, [0, 1, 6, 7, 8]),
        (4, 2, 3, [0, 1, 2, 3]),
        (3, 2, 3, [0, 2]),
        (1, 2, 3, []),
        (1, 2, 0, [0]),
        (0, 2, 3, []),
        (5, 0, 3, [2, 3, 4]),
    ],
)
def test_positions_of_long_and_short_prompts(length: int, first: int, last: int, expected: list[int]) -> None:
    start = torch.tensor([0, 4])  # the second row is padded on the left
    found = positions_of(start, start + length, first, last, 16)
    for row, offset in enumerate((0, 4)):
        assert found.index[row][found.valid[row]].tolist() == [offset + position for position in expected]
    assert found.index.min() >= 0
    assert found.index.max() < 16


def test_a_prompt_ends_at_the_first_trained_token_or_at_the_padding() -> None:
    ids = torch.zeros(3, 6, dtype=torch.int64)
    labels = torch.tensor([[-100, -100, 1, 1, -100, 1], [-100] * 6, [-100, -100, -100, -100, 1, 1]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    prompts = prompts_of({"input_ids": ids, "labels": labels, "attention_mask": mask})
    assert prompts.start.tolist() == [0, 0, 2]
    assert prompts.stop.tolist() == [2, 4, 4]


def test_generation_edits_the_prompt_alone() -> None:
    torch.manual_seed(0)
    model = tiny_llama().eval()
    adapted = insert_loreft(model, rank=3, first=2, last=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    prompt = TOKENS[:1, :7]
    cached = model.generate(prompt, max_new_tokens=5, do_sample=False)
    # The same without a cache, where each forward sees prompt and answer, and is told where the prompt ends.
    row = prompt
    for _ in range(5):
        labels = torch.full_like(row, -100)
        labels[:, 7:] = 1
        adapted.positions.tell(prompts_of({"input_ids": row, "labels": labels}))
        with torch.no_grad():
            row = torch.cat([row, model(input_ids=row, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, row)
    with adapted.disabled():
        assert torch.equal(
            model(input_ids=prompt).logits, tiny_llama().eval()(input_ids=prompt).logits
        )  # bitwise the base model


def test_two_forwards_before_their_backward_under_activation_checkpointing() -> None:
    """What is recomputed in the backward must not be edited at the positions of the other forward."""

    def gradients(model: Any) -> list[Tensor]:
        torch.manual_seed(1)
        adapted = insert_loreft(model, rank=3, first=2, last=2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        losses = []
        first, second = copy.deepcopy(batches()[:2])
        second["labels"][:, :12] = -100
        for batch in (first, second):
            adapted.positions.tell(prompts_of(batch))
            losses.append(loss_of(model(input_ids=batch["input_ids"], use_cache=False).logits, batch["labels"]))
        (losses[0] + losses[1]).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    recomputed = tiny_llama()
    checkpoint_activations(recomputed, True)
    assert any(getattr(block, "gradient_checkpointing", False) for block in recomputed.model.layers)
    for expected, found in zip(gradients(tiny_llama()), gradients(recomputed), strict=True):
        assert torch.equal(expected, found)


def test_a_copy_of_a_model_has_its_own_edits() -> None:
    model = tiny_llama().eval()
    insert_loreft(model, rank=2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].loreft.edits[0].bias.fill_(3.0)
        base, changed = (m(input_ids=TOKENS[:2]).logits for m in (model, other))
    assert torch.equal(base, tiny_llama().eval()(input_ids=TOKENS[:2]).logits)
    assert not torch.allclose(base, changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"first": 0, "last": 0}, "first=0, last=0"),
        ({"layers": [2]}, "there is no block 2; the model has 2"),
        ({"block_classes": ["Blok"]}, "no module of the model is a 'Blok'"),
    ],
)
def test_settings_are_checked(settings: Any, message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        insert_loreft(tiny_llama(), **settings)
