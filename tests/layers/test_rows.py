"""Embeddings and heads with trained rows: gradients beside plain operators, casts, copies."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paca_lightning.layers.rows import RowsEmbedding, RowsHead, release_all_rows, row_modules, train_rows
from tests.layers.reference import ROUNDING

VOCABULARY, FEATURES, IDS = 23, 8, (4, 20, 21)
TOKENS = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
TOKENS[TOKENS == 20] = 0  # a row that no token has
TOKENS[0, :4], TOKENS[2, 1] = torch.tensor([4, 21, 4, 4]), 21


def ends(dtype: torch.dtype = torch.float32, tied: bool = False, trained: bool = True) -> nn.ModuleDict:
    torch.manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, FEATURES, dtype=dtype)
    head = nn.Linear(FEATURES, VOCABULARY, bias=False, dtype=dtype)
    if tied:
        head.weight = embedding.weight
    if trained:
        train_rows(embedding, head, IDS)
    return nn.ModuleDict({"embedding": embedding, "head": head})


def loss_of(model: Any) -> Tensor:
    logits = model["head"](model["embedding"](TOKENS).tanh())
    return F.cross_entropy(logits.flatten(0, 1).double(), TOKENS.flatten())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_rows_of_the_whole_weight(dtype: torch.dtype, tied: bool) -> None:
    model, dense = ends(dtype, tied), ends(dtype, tied, trained=False)
    assert torch.equal(loss_of(model), loss_of(dense))
    loss_of(model).backward()
    loss_of(dense.double()).backward()
    for name in ("embedding", "head"):
        found, expected = model[name].paca_rows.grad, dense[name].weight.grad[list(IDS)]  # type: ignore[index, union-attr]
        assert found.dtype == torch.promote_types(dtype, torch.float32)  # type: ignore[union-attr]
        atol = 4 * ROUNDING[dtype] * float(expected.abs().max())  # type: ignore[operator]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)  # type: ignore[union-attr, operator]
    if not tied:
        assert not model["embedding"].paca_rows.grad[1].any()  # type: ignore[index, union-attr]


def test_under_autocast_the_head_computes_in_half_precision_and_rows_keep_theirs() -> None:
    model, dense = ends(), ends(trained=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
        loss_of(dense).backward()
    for name in ("embedding", "head"):
        found, expected = model[name].paca_rows.grad, dense[name].weight.grad[list(IDS)]  # type: ignore[index, union-attr]
        torch.testing.assert_close(found, expected, rtol=0, atol=4e-3 * float(expected.abs().max()))  # type: ignore[operator]


def test_a_cast_narrows_the_weight_alone_and_a_wider_weight_gets_the_rows_again() -> None:
    model = ends(tied=True)
    rows = model["embedding"].paca_rows
    with torch.no_grad():
        rows.add_(1e-5)
    model.bfloat16()
    assert model["head"].paca_rows is rows
    assert (rows.dtype, model["head"].weight.dtype) == (torch.float32, torch.bfloat16)
    model.float()
    assert torch.equal(model["head"].weight[list(IDS)], rows)
    model.double()
    assert rows.dtype == torch.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_tied_to_themselves(copied: Any) -> None:
    model = ends(tied=True)
    twin = copied(model)
    assert [path for path, _ in row_modules(twin)] == ["embedding"]
    assert twin["head"].paca_rows is twin["embedding"].paca_rows
    assert twin["head"].paca_rows is not model["head"].paca_rows
    release_all_rows(twin)
    assert (type(twin["embedding"]), type(twin["head"])) == (nn.Embedding, nn.Linear)
    assert isinstance(model["embedding"], RowsEmbedding)
    assert isinstance(model["head"], RowsHead)


def test_a_state_dict_brings_the_rows_into_the_weight() -> None:
    model, other = ends(), ends()
    with torch.no_grad():
        for _, module in row_modules(other):
            module.paca_rows.mul_(2)
    state = {name: tensor for name, tensor in other.state_dict().items() if name.endswith("paca_rows")}
    model.load_state_dict(state, strict=False)
    assert torch.equal(model["head"].weight[list(IDS)], other["head"].paca_rows)
    assert state.keys() == {"embedding.paca_rows", "head.paca_rows"}


def test_a_state_dict_of_the_weight_alone_leaves_the_rows_in_it() -> None:
    model, other = ends(), ends(trained=False)
    model.load_state_dict({"head.weight": other["head"].weight + 1}, strict=False)
    assert torch.equal(model["head"].weight[list(IDS)], model["head"].paca_rows)
    assert torch.equal(model["head"].weight[0], other["head"].weight[0] + 1)
