import itertools

import pytest
import torch
import torch.nn.functional as F
import transformers

from paca_lightning.tasks import loss as loss_module
from paca_lightning.tasks.loss import CausalLMLoss, linear_cross_entropy
from tests.tiny import tiny_llama

ROWS, FEATURES, VOCABULARY = 24, 8, 64


def head(dtype=torch.float32, bias=False, frozen=True, rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, FEATURES, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, FEATURES, generator=generator).to(dtype).requires_grad_(not frozen)
    bias = torch.randn(VOCABULARY, generator=generator).to(dtype).requires_grad_(not frozen) if bias else None
    labels = torch.randint(VOCABULARY, (rows,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels, bias


def plain(hidden, weight, labels, bias):
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def gradients(function, tensors):
    hidden, weight, labels, bias = tensors
    value = function(hidden, weight, labels, bias)
    wanted = [tensor for tensor in (hidden, weight, bias) if tensor is not None and tensor.requires_grad]
    return value.detach(), torch.autograd.grad(value / 7, wanted)


@pytest.fixture(params=["torch's own", "chunked loop"])
def implementation(request, monkeypatch):
    """Both ways to the loss: torch's op where it is there and exact, our loop for half precision and older torch."""
    if request.param == "chunked loop":
        monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    elif not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no linear_cross_entropy")


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("chunk_size", [1, 5, 24, 1000])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_equal_the_plain_ones(bias, frozen, chunk_size):
    tensors = head(bias=bias, frozen=frozen)
    value, grads = gradients(lambda *t: linear_cross_entropy(*t, chunk_size=chunk_size), tensors)
    expected_value, expected_grads = gradients(plain, tensors)
    torch.testing.assert_close(value, expected_value, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_trained_rows_of_a_frozen_head_get_the_gradient_of_these_rows(dtype, chunk_size):
    hidden, weight, labels, _ = head(dtype)
    ids = torch.tensor([3, 17, 63])
    wide = torch.promote_types(dtype, torch.float32)
    rows = weight[ids].to(wide).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size, new_rows=(rows, ids))
    found = torch.autograd.grad(loss / 7, (hidden, rows))
    exact = weight.double().requires_grad_()
    value = plain(hidden.double(), exact, labels, None)
    grads = torch.autograd.grad(value / 7, (hidden, exact))
    rounding = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(loss.double(), value, rtol=rounding, atol=0)
    for grad, expected in zip(found, (grads[0], grads[1][ids]), strict=True):
        torch.testing.assert_close(
            grad.double(), expected.double(), rtol=0, atol=rounding * float(expected.abs().max())
        )
    assert found[1].dtype == wide


@pytest.mark.parametrize("frozen", [True, False])
def test_bf16_keeps_the_loss_in_fp32_and_its_gradients_are_as_exact_as_the_plain_ones(frozen):
    half = head(torch.bfloat16, bias=True, frozen=frozen)
    exact = [t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in half]
    exact_value, exact_grads = gradients(plain, exact)
    value, grads = gradients(lambda *t: linear_cross_entropy(*t, chunk_size=7), half)
    _, plain_grads = gradients(plain, half)

    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact_value, rtol=2e-3, atol=0)
    for ours, theirs, right in zip(grads, plain_grads, exact_grads, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - right).norm() <= 1.2 * (theirs.float() - right).norm()


def test_gradcheck(monkeypatch):
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    hidden, weight, labels, bias = head(torch.float64, bias=True, frozen=False, rows=6)
    torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, labels, b, chunk_size=4), (hidden, weight, bias)
    )


@pytest.mark.usefixtures("implementation")
def test_a_chunk_or_a_batch_without_a_trained_token_is_nothing_special():
    hidden, weight, labels, _ = head()
    labels[:12] = -100
    value, grads = gradients(lambda *t: linear_cross_entropy(*t, chunk_size=4), (hidden, weight, labels, None))
    expected_value, expected_grads = gradients(plain, (hidden, weight, labels, None))
    torch.testing.assert_close((value, grads), (expected_value, expected_grads))

    value, (grad,) = gradients(linear_cross_entropy, (hidden, weight, torch.full_like(labels, -100), None))
    assert value == 0
    assert not grad.any()


def test_autocast_decides_the_dtype_of_the_products():
    tensors = head()
    with torch.autocast("cpu", torch.bfloat16):
        value, (grad,) = gradients(linear_cross_entropy, tensors)
    half = [tensors[0].detach().bfloat16().requires_grad_(), tensors[1].bfloat16(), tensors[2], None]
    expected_value, (expected_grad,) = gradients(linear_cross_entropy, half)
    assert (value, value.dtype, grad.dtype) == (expected_value, torch.float32, torch.float32)
    torch.testing.assert_close(grad, expected_grad.float())


def peak_bytes(function):
    """The most memory that was allocated at a time while a function ran, beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes), default=0)


def saved_bytes(function):
    """Memory held for the backward of what a function returns, other than through its own inputs."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_logits_never_exist(dtype):
    rows, chunk = 512, 16
    tensors = head(dtype, rows=rows)
    hidden = tensors[0]
    logits = rows * VOCABULARY * hidden.element_size()

    def fused(*tensors):
        return linear_cross_entropy(*tensors, chunk_size=chunk)

    # Plain: the logits and their gradient at least. Fused: hidden states, their gradients, labels, a few chunks.
    assert peak_bytes(lambda: gradients(plain, tensors)) > 2 * logits
    assert peak_bytes(lambda: gradients(fused, tensors)) < 0.75 * logits
    assert saved_bytes(lambda: plain(*tensors)) > logits
    assert saved_bytes(lambda: fused(*tensors)) <= 2 * hidden.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_is_computed_for_a_frozen_head(dtype):
    def peak(frozen):
        tensors = head(dtype, rows=2, frozen=frozen)
        return peak_bytes(lambda: linear_cross_entropy(*tensors, chunk_size=1).backward())

    weight_gradient = VOCABULARY * FEATURES * dtype.itemsize
    assert peak(frozen=True) < weight_gradient <= peak(frozen=False)


def batch(vocabulary=96, rows=3, length=11):
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids}, labels


def small(config_class, **settings):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config_class(vocab_size=96, **settings)).eval()


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
MODELS = {
    "llama": (True, lambda: tiny_llama(vocab_size=96)),
    "tied llama": (True, lambda: tiny_llama(vocab_size=96, tie_word_embeddings=True)),
    "gpt2": (True, lambda: small(transformers.GPT2Config, n_embd=32, n_layer=1, n_head=4)),
    "phi, head with a bias": (True, lambda: small(transformers.PhiConfig, **SMALL)),
    "gemma2, soft-capped logits": (
        False,
        lambda: small(transformers.Gemma2Config, head_dim=8, final_logit_softcapping=0.5, **SMALL),
    ),
    "granite, scaled logits": (False, lambda: small(transformers.GraniteConfig, logits_scaling=8.0, **SMALL)),
    "cohere, scaled logits": (False, lambda: small(transformers.CohereConfig, logit_scale=0.1, **SMALL)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_model_itself(name, dtype):
    fused, build = MODELS[name]
    model = build().to(dtype)
    inputs, labels = batch()
    expected = model(**inputs, labels=labels, use_cache=False).loss
    expected.backward()
    expected_grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    step = CausalLMLoss(chunk_size=4)
    total, count = step(model, inputs, labels)
    (total / count).backward()

    assert step.fused is fused
    assert count == (labels[:, 1:] != -100).sum()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-3}
    torch.testing.assert_close(total / count, expected.float(), **tolerance)
    for name, parameter in model.named_parameters():
        if name in expected_grads:
            torch.testing.assert_close(parameter.grad, expected_grads[name], **tolerance)
        else:
            assert parameter.grad is None


def test_a_model_without_a_plain_head_is_told_of_once(monkeypatch):
    said = []
    monkeypatch.setattr(loss_module, "rank_zero_info", said.append)
    model = small(transformers.GraniteConfig, logits_scaling=8.0, **SMALL)
    step = CausalLMLoss()
    for _ in range(3):
        step(model, *batch())
    assert said == ["GraniteForCausalLM changes its logits after the head: the loss needs full logits."]


def test_the_head_gives_logits_again_after_the_loss():
    model = tiny_llama(vocab_size=96)
    inputs, labels = batch()
    before = model(**inputs).logits
    CausalLMLoss()(model, inputs, labels)
    assert "forward" not in vars(model.lm_head)
    torch.testing.assert_close(model(**inputs).logits, before)


@pytest.mark.parametrize("change", [lambda output: output * 0.5, lambda output: output.mul_(0.5)])
def test_a_hook_that_changes_the_heads_output_is_respected(change):
    model = tiny_llama(vocab_size=96)
    model.lm_head.register_forward_hook(lambda module, args, output: change(output))
    inputs, labels = batch()
    step = CausalLMLoss()
    total, count = step(model, inputs, labels)
    assert not step.fused
    torch.testing.assert_close(total / count, model(**inputs, labels=labels).loss)
