"""A rotated model computes what the model did, and its columns are the directions that were asked for."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from scripts.first_batches import first_training_batches
from scripts.rotated_model import (
    fold_norms,
    principal_directions,
    random_directions,
    readers,
    rotate,
)
from tests.tiny import tiny_model_directory
from tests.tools.compare.tasks import debug_task

TOLERANCE = 1e-6  # Llama's norms compute in fp32, whatever the weights are


@pytest.fixture
def model(tmp_path: Path) -> LlamaForCausalLM:
    """A tiny Llama in fp64 whose norms have weights other than 1."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_directory(tmp_path / "model", vocab_size=512)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm, _ in readers(model):
            norm.weight.uniform_(0.5, 2, generator=generator)
    return model.eval()


def test_a_rotated_model_computes_the_same_and_is_turned_back(model: LlamaForCausalLM) -> None:
    tokens = torch.arange(24).view(2, 12)
    before = model(tokens).logits
    fold_norms(model)
    folded = copy.deepcopy(model.state_dict())
    basis = random_directions(model.config.hidden_size, seed=1)

    rotate(model, basis)
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=TOLERANCE)
    assert not torch.allclose(model.state_dict()["model.embed_tokens.weight"], folded["model.embed_tokens.weight"])

    rotate(model, basis.T)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, folded[name], rtol=0, atol=1e-12)


def test_what_layers_read_lies_along_its_principal_directions(model: LlamaForCausalLM) -> None:
    batches = first_training_batches(debug_task())
    fold_norms(model)
    rotate(model, principal_directions(model, batches))

    seen: list[torch.Tensor] = []
    for norm, _ in list(readers(model))[:-1]:
        norm.register_forward_hook(lambda *found: seen.append(found[-1].detach().flatten(0, -2)))
    for batch in batches:
        model(**batch)
    tokens = torch.cat(seen)
    moment = tokens.T @ tokens
    sizes = moment.diagonal()
    torch.testing.assert_close(moment, torch.diag(sizes), rtol=0, atol=TOLERANCE * float(sizes.max()))
    assert sizes.diff().max() <= TOLERANCE * sizes.max()
