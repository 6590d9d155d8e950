"""Rows of new tokens that are trained beside the columns, beside a plain reference."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paca_lightning import (
    PaCAConfig,
    PaCAError,
    add_new_tokens,
    apply_paca,
    attach,
    disable_paca,
    merge,
    unload,
    write_columns,
)
from paca_lightning.conversion.write_back import rows_stepped_by
from paca_lightning.layers.rows import RowsEmbedding, RowsHead
from paca_lightning.tasks.decoder_blocks import checkpoint_activations
from paca_lightning.tasks.loss import CausalLMLoss
from tests.new_tokens import IDS, NEW, TOKENS, VOCABULARY, masked_dense, plain_loss, with_new_tokens
from tests.plain_training import train_masked
from tests.tiny import tiny_llama, tiny_tokenizer

CONFIG = PaCAConfig(r=4)


def train(model: Any, steps: int, *, chunks: int | None = None, decay: float = 0.0, lr: float = 1e-2) -> None:
    """Train with the model's own loss, or with that of our module, so many rows of logits at a time."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=decay)
    attach(optimizer, model)
    for _ in range(steps):
        optimizer.zero_grad()
        if chunks is None:
            plain_loss(model).backward()
        else:
            total, count = CausalLMLoss(chunks)(model, {"input_ids": IDS}, IDS)
            (total / count).backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("chunks", [None, 5])
@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_twenty_steps_are_those_of_the_dense_model_with_all_other_rows_masked(
    tied: bool, spare: bool, chunks: int | None
) -> None:
    settings: dict[str, Any] = {"tie_word_embeddings": tied} | ({"vocab_size": 384} if spare else {})
    model, dense = (with_new_tokens(**settings)[0].double() for _ in range(2))
    apply_paca(model, CONFIG)
    train_masked(dense, masked_dense(dense, model), plain_loss, 20, lr=1e-2)
    train(model, 20, chunks=chunks, decay=0.0)
    merge(model)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=1e-9)  # sums in another order
    start = with_new_tokens(**settings)[0].double().get_input_embeddings().weight
    assert not torch.isclose(dense.get_input_embeddings().weight[NEW], start[NEW]).any()


@pytest.mark.parametrize("tied", [False, True])
def test_in_fp32_the_first_gradients_are_bitwise_those_of_the_dense_embedding(tied: bool) -> None:
    model, dense = (with_new_tokens(tie_word_embeddings=tied)[0] for _ in range(2))
    apply_paca(model, CONFIG)
    inputs = torch.randn(4, 12, 64, generator=torch.Generator().manual_seed(0))
    for each in (model, dense):
        each.get_input_embeddings()(IDS).mul(inputs).sum().backward()
    assert torch.equal(model.model.embed_tokens.paca_rows.grad, dense.model.embed_tokens.weight.grad[NEW])


def test_small_steps_of_bf16_rows_count_and_all_other_rows_stay() -> None:
    model, _ = with_new_tokens()
    before = state(model.bfloat16())
    apply_paca(model, CONFIG)
    model.bfloat16()
    train(model, 5, lr=1e-5)
    for path in ("model.embed_tokens", "lm_head"):
        module = model.get_submodule(path)
        start = before[f"{path}.weight"]
        assert module.paca_rows.dtype == torch.float32
        assert 0 < float((module.paca_rows.detach() - start[NEW]).abs().max()) < 1e-4  # most steps are lost in bf16
        assert torch.equal(module.weight[NEW], module.paca_rows.bfloat16())
        assert torch.equal(module.weight[:VOCABULARY], start[:VOCABULARY])


def test_rows_have_no_weight_decay_and_norms_keep_their_own_rate() -> None:
    model, _ = with_new_tokens()
    apply_paca(model, PaCAConfig(r=4, train_norms=True, norms_lr=0.1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    handle = attach(optimizer, model)
    attach(optimizer, model)  # once more changes no group
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (1e-2, 0.5),
        (1e-3, 0.0),
        (1e-2, 0.0),
    ]
    rows = {id(model.model.embed_tokens.paca_rows), id(model.lm_head.paca_rows)}
    assert {id(p) for p in optimizer.param_groups[2]["params"]} == rows
    handle.remove()


def test_unload_gives_back_the_model_as_it_was_built_and_merge_keeps_the_rows() -> None:
    built, _ = with_new_tokens()
    model = copy.deepcopy(built)
    apply_paca(model, CONFIG)
    train(model, 3)
    trained = model.eval()(input_ids=IDS).logits
    assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, trained)
    with disable_paca(model):
        assert torch.equal(model(input_ids=IDS).logits, built.eval()(input_ids=IDS).logits)
    assert torch.equal(model(input_ids=IDS).logits, trained)
    merged = merge(copy.deepcopy(model))
    assert type(merged.lm_head) is nn.Linear
    assert torch.equal(merged(input_ids=IDS).logits, trained)
    assert same(state(unload(model)), state(built))
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in built.parameters()]


def test_a_backward_after_the_reference_sees_the_weight_of_its_forward() -> None:
    model, twin = (with_new_tokens()[0] for _ in range(2))
    for each in (model, twin):
        apply_paca(each, CONFIG)
        train(each, 2)
    loss, expected = (each(input_ids=IDS, labels=IDS).loss for each in (model, twin))
    with disable_paca(model), torch.no_grad():
        model(input_ids=IDS)
    loss.backward()
    expected.backward()
    assert torch.equal(model.lm_head.paca_rows.grad, twin.lm_head.paca_rows.grad)


def test_a_resumed_model_ends_bitwise_alike() -> None:
    models = [with_new_tokens(tie_word_embeddings=True)[0] for _ in range(3)]
    optimizers = []
    for model in models:
        apply_paca(model, CONFIG)
        optimizers.append(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    for model, optimizer, steps in zip(models, optimizers, (4, 2, 2), strict=True):
        attach(optimizer, model)
        if model is models[2]:
            model.load_state_dict(models[1].state_dict())
            optimizer.load_state_dict(optimizers[1].state_dict())
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    assert same(state(models[2]), state(models[0]))


def test_accumulated_gradients_and_applying_again_change_nothing() -> None:
    model, _ = with_new_tokens()
    report = str(apply_paca(model, CONFIG))
    assert (
        "Trained rows of new tokens: 3 of model.embed_tokens, 192 parameters, in fp32, without weight decay" in report
    )
    rows = model.lm_head.paca_rows
    again = apply_paca(model, CONFIG)
    assert str(again) == report
    assert model.lm_head.paca_rows is rows
    assert rows.requires_grad
    model(input_ids=IDS, labels=IDS).loss.backward()
    whole = rows.grad.clone()
    rows.grad = None
    for part in IDS.chunk(4):
        (model(input_ids=part, labels=part).loss / 4).backward()
    torch.testing.assert_close(rows.grad, whole)


def test_compiled_and_checkpointed_models_have_the_same_gradients() -> None:
    def gradients(change: Any) -> dict[str, Tensor]:
        model, _ = with_new_tokens()
        apply_paca(model, CONFIG)
        plain_loss(change(model)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def checkpointed(model: Any) -> Any:
        checkpoint_activations(model, True)
        return model

    plain = gradients(lambda model: model)
    assert {"model.embed_tokens.paca_rows", "lm_head.paca_rows"} < plain.keys()
    assert same(gradients(checkpointed), plain)
    compiled = gradients(lambda model: torch.compile(model, backend="aot_eager"))
    assert compiled.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=0, atol=1e-6)


def test_values_that_take_the_rows_place_are_used_by_every_operator() -> None:
    model, _ = with_new_tokens()
    apply_paca(model, CONFIG)
    generator = torch.Generator().manual_seed(0)
    values = {
        f"{path}.paca_rows": torch.randn(3, 64, generator=generator) for path in ("model.embed_tokens", "lm_head")
    }
    replaced = torch.func.functional_call(model, values, kwargs={"input_ids": IDS}).logits
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
    write_columns(model)
    torch.testing.assert_close(replaced, model(input_ids=IDS).logits)


def test_an_optimizer_of_rows_alone_writes_them() -> None:
    model, _ = with_new_tokens()
    apply_paca(model, CONFIG)
    optimizer = torch.optim.SGD([model.model.embed_tokens.paca_rows, model.lm_head.paca_rows], lr=0.1)
    assert rows_stepped_by(optimizer, model).keys() == {"model.embed_tokens", "lm_head"}
    attach(optimizer, model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert torch.equal(model.lm_head.weight[NEW], model.lm_head.paca_rows)


def test_a_conversion_that_fails_leaves_a_plain_model() -> None:
    model, _ = with_new_tokens()
    before = state(model)
    with pytest.raises(PaCAError, match=r"modules_to_save trains 'lm_head' whole.*new_tokens_train: all"):
        apply_paca(model, PaCAConfig(r=4, modules_to_save=["lm_head"]))
    with pytest.raises(PaCAError, match=r"target_modules names 'lm_head'.*exclude_modules: \[lm_head\]"):
        apply_paca(model, PaCAConfig(r=4, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(PaCAError, match="train_biases=True"):
        apply_paca(model, PaCAConfig(r=4, train_biases=True))
    assert not any(isinstance(module, RowsEmbedding | RowsHead) for module in model.modules())
    assert same(state(model), before)


def test_an_embedding_thawed_beside_its_rows_and_second_derivatives_are_refused() -> None:
    model, _ = with_new_tokens()
    apply_paca(model, CONFIG)
    model.model.embed_tokens.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(PaCAError, match=r"'model.embed_tokens.weight' was thawed.*new_tokens_train: all"):
        attach(optimizer, model)
    model.model.embed_tokens.weight.requires_grad_(False)
    with pytest.raises(PaCAError, match="create_graph=True"):
        torch.autograd.grad(model.lm_head(torch.randn(2, 64)).sum(), model.lm_head.paca_rows, create_graph=True)


def test_all_trains_embedding_and_head_whole() -> None:
    model, _ = with_new_tokens(train="all")
    report = apply_paca(model, CONFIG)
    assert sorted(report.saved) == ["lm_head", "model.embed_tokens"]
    assert model.model.embed_tokens.weight.requires_grad
    assert type(model.lm_head) is nn.Linear
    before = state(model)
    train(model, 1)
    assert not torch.equal(model.lm_head.weight[:VOCABULARY], before["lm_head.weight"][:VOCABULARY])


def test_new_rows_begin_as_the_mean_and_move_no_random_state() -> None:
    base, model, tokenizer = tiny_llama(vocab_size=VOCABULARY), tiny_llama(vocab_size=VOCABULARY), tiny_tokenizer()
    random_state = torch.random.get_rng_state()
    add_new_tokens(model, tokenizer, TOKENS)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    for end, plain in ((model.lm_head, base.lm_head), (model.model.embed_tokens, base.model.embed_tokens)):
        mean = plain.weight.double().mean(0).float()
        torch.testing.assert_close(end.weight[NEW], mean.expand(3, -1), rtol=0, atol=1e-7)
        assert torch.equal(end.weight[:VOCABULARY], plain.weight)
    assert model.config.vocab_size == VOCABULARY + 3
