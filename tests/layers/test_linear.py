"""A PaCA layer computes what its weight says and trains like a dense layer whose gradient is masked."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from paca_lightning import PaCAConfig, PaCAError, PaCALinear, apply_paca, attach, merge, paca_layers
from tests.tiny import tiny_llama

IN, OUT, R = 24, 16, 4
ALPHA = 6.0  # scaling 1.5
INDICES = torch.tensor([2, 3, 11, 23])
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}  # largest difference over largest value


def layer_and_twin(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[PaCALinear, nn.Linear]:
    """A PaCA layer with a trained delta, and a plain dense layer with the same weight."""
    torch.manual_seed(0)
    layer = PaCALinear(IN, OUT, bias, dtype=dtype, r=R, alpha=ALPHA, indices=INDICES)
    with torch.no_grad():
        layer.paca_delta.normal_(std=0.1)
    layer.write_columns()
    twin = nn.Linear(IN, OUT, bias, dtype=dtype)
    twin.load_state_dict({name: value.clone() for name, value in layer.state_dict().items() if "paca" not in name})
    return layer, twin


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def eager(module: nn.Module, input: Tensor) -> Tensor:
    return module(input)


def compiled(module: nn.Module, input: Tensor) -> Tensor:
    return torch.compile(module, fullgraph=True, backend="aot_eager")(input)


def autocast(module: nn.Module, input: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return module(input)


def checkpointed(module: nn.Module, input: Tensor) -> Tensor:
    return checkpoint(module, input, use_reentrant=False)


@pytest.mark.parametrize("run", [eager, compiled, autocast, checkpointed])
@pytest.mark.parametrize("shape", [(IN,), (7, IN), (2, 5, IN)], ids=["1-D", "2-D", "3-D"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parity_with_a_masked_dense_gradient(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...], run: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    torch.compiler.reset()
    layer, twin = layer_and_twin(dtype, bias)
    results = []
    for module in (layer, twin):
        torch.manual_seed(1)
        input = torch.randn(shape, dtype=dtype, requires_grad=True)
        output = run(module, input)
        # A gradient that differs from place to place.
        (output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        results.append((output, input.grad))
    (output, input_grad), (expected_output, expected_input_grad) = results

    assert torch.equal(output, expected_output)  # bitwise: it is the same matrix product
    assert torch.equal(input_grad, expected_input_grad)
    rounding = ROUNDING[torch.bfloat16 if run is autocast else dtype]
    assert layer.paca_delta.grad.dtype == layer.paca_delta.dtype
    assert relative(layer.paca_delta.grad, ALPHA / R * twin.weight.grad[:, INDICES].double()) <= rounding
    assert layer.weight.grad is None
    assert bias is False or layer.bias.grad is None


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    ],
    ids=["SGD", "AdamW"],
)
def test_20_steps_equal_a_dense_update_with_a_masked_gradient(
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer], accumulate: int
) -> None:
    """Largest difference of any weight after 20 steps: 1.8e-16 in fp64, of updates of up to 0.5."""
    torch.manual_seed(0)
    start = nn.Linear(IN, OUT, dtype=torch.float64)
    layer = PaCALinear(IN, OUT, dtype=torch.float64, r=R, alpha=ALPHA, indices=INDICES)
    layer.load_state_dict(start.state_dict(), strict=False)

    # The reference knows nothing of columns: a dense update, of which a mask lets the selected columns learn. Decay
    # pulls the update to zero, which is the weight to the pretrained one.
    mask = torch.zeros(OUT, IN, dtype=torch.float64)
    mask[:, INDICES] = 1
    update = torch.zeros(OUT, IN, dtype=torch.float64, requires_grad=True)

    optimizer, reference = make_optimizer([layer.paca_delta]), make_optimizer([update])
    attach(optimizer, layer)
    for step in range(1, 20 * accumulate + 1):
        input, target = torch.randn(5, IN, dtype=torch.float64), torch.randn(5, OUT, dtype=torch.float64)
        (layer(input) - target).square().mean().backward()
        dense = start.weight.detach() + ALPHA / R * update
        (nn.functional.linear(input, dense, start.bias.detach()) - target).square().mean().backward()
        if step % accumulate == 0:
            update.grad *= mask
            for one in (optimizer, reference):
                one.step()
                one.zero_grad()
    expected = (start.weight + ALPHA / R * update).detach()
    assert (expected - start.weight).abs().max() > 0.1
    assert (layer.weight - expected).abs().max() < 4e-15


def test_an_in_place_activation_may_follow() -> None:
    for shape in [(7, IN), (2, 5, IN)]:
        layer, twin = layer_and_twin()
        input = torch.randn(shape)
        for module in (layer, twin):
            nn.Sequential(module, nn.ReLU(inplace=True))(input).square().sum().backward()
        assert relative(layer.paca_delta.grad, ALPHA / R * twin.weight.grad[:, INDICES]) <= ROUNDING[torch.float32]


def test_a_first_layer_computes_no_gradient_of_its_input() -> None:
    layer, _ = layer_and_twin()
    output = layer(torch.randn(7, IN))
    tap = output.grad_fn
    # The linear map is no part of the graph: neither its input nor its weight needs a gradient.
    assert [type(node).__name__ for node, _ in tap.next_functions if node is not None] == ["AccumulateGrad"]


def test_without_gradients_nothing_is_tapped() -> None:
    layer, twin = layer_and_twin()
    input = torch.randn(2, 5, IN)
    with torch.no_grad():
        assert torch.equal(layer(input), twin(input))
    with torch.inference_mode():
        assert torch.equal(layer(input), twin(input))
    layer.requires_grad_(False)
    assert layer(input).grad_fn is None


def saved_tensors(run: Callable[[], Tensor]) -> dict[tuple[int, tuple[int, ...]], Tensor]:
    """What autograd keeps for the backward, each storage and shape once."""
    kept: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr(), tuple(tensor.shape)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return kept


def test_a_layer_saves_r_channels_of_its_input_beside_the_weight() -> None:
    layer, _ = layer_and_twin()
    input = torch.randn(50, IN, requires_grad=True)
    kept = saved_tensors(lambda: layer(input)).values()
    weights = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() == layer.weight.data_ptr()]
    (rest,) = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() != layer.weight.data_ptr()]
    assert len(weights) == 1  # for the gradient of the input: no copy of it
    assert rest.shape == (50, R)
    assert torch.equal(rest, input[:, INDICES])


def activation_bytes(model: LlamaForCausalLM) -> int:
    """Bytes kept for the backward at 2 x 512 tokens, but for parameters."""
    ids = torch.randint(0, 384, (2, 512), generator=torch.Generator().manual_seed(0))
    kept = saved_tensors(lambda: model(inputs_embeds=embedded(model, ids), labels=ids, use_cache=False).loss).values()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in storages.items() if address not in parameters)


def embedded(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids).detach().requires_grad_()  # every layer must pass a gradient on


def test_a_llama_saves_as_little_as_one_with_frozen_weights_and_far_less_than_lora() -> None:
    # The proportions of hidden 1024 at a quarter: 1024 tokens, r much smaller than a layer's width.
    from peft import LoraConfig, get_peft_model

    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "max_position_embeddings": 512}
    floor, ours = tiny_llama(**shape).bfloat16().requires_grad_(False), tiny_llama(**shape).bfloat16()
    apply_paca(ours, PaCAConfig(r=4))
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = get_peft_model(tiny_llama(**shape).bfloat16(), LoraConfig(r=8, target_modules=projections)).base_model.model
    floor_bytes, our_bytes, lora_bytes = activation_bytes(floor), activation_bytes(ours), activation_bytes(lora)
    assert our_bytes <= 1.02 * floor_bytes
    assert our_bytes <= 0.6 * lora_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, IN), (2, 5, IN)], ids=["2-D", "3-D"])
def test_gpt2s_transposed_layer_trains_alike(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    twin = Conv1D(OUT, IN).to(dtype)
    model = nn.Sequential(copy.deepcopy(twin))
    apply_paca(model, PaCAConfig(r=R, alpha=ALPHA), indices={"0": INDICES})
    layer = model[0]
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert torch.equal(layer.weight, twin.weight)  # the layout of base checkpoints stays

    input = torch.randn(shape, dtype=dtype)
    outputs = [module(input) for module in (model, twin)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.float().square().sum().backward()
    expected = ALPHA / R * twin.weight.grad[INDICES].t()
    assert relative(layer.paca_delta.grad, expected) <= ROUNDING[dtype]

    torch.optim.SGD([layer.paca_delta], lr=0.1).step()
    layer.write_columns()
    trained = twin.weight.detach().clone()
    trained[INDICES] = trained[INDICES].float().add(layer.paca_delta.detach().t(), alpha=ALPHA / R).to(dtype)
    assert torch.equal(layer.weight, trained)
    merge(model)
    assert type(model[0]) is Conv1D
    assert torch.equal(model[0].weight, trained)


def test_forward_hooks_survive_and_see_what_they_saw() -> None:
    seen = []
    model = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU())
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    apply_paca(model, PaCAConfig(r=R))
    model(torch.randn(3, IN)).sum().backward()
    merge(model)(torch.randn(3, IN))
    assert seen == ["PaCALinear", "Linear"]


# -- Casting, moving, copying


def expected_weight(layer: PaCALinear) -> Tensor:
    """Base columns plus scaled delta, as cast, in plain torch."""
    columns = torch.add(layer.paca_base_columns, layer.paca_delta, alpha=layer.scaling)
    return layer.weight.detach().index_copy(1, layer.paca_indices, columns.detach().to(layer.weight.dtype))


@pytest.mark.parametrize(
    ("start", "cast", "weight", "delta"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64, torch.float64),
    ],
)
def test_a_cast_never_narrows_the_delta_and_keeps_the_weight_in_step(
    start: torch.dtype, cast: torch.dtype, weight: torch.dtype, delta: torch.dtype
) -> None:
    layer, _ = layer_and_twin(start)
    before = layer.paca_delta.detach().clone()
    parameter = layer.paca_delta
    layer.paca_delta.grad = before.clone()
    layer.to(cast)
    assert layer.paca_delta is parameter  # the optimizer's
    assert (layer.weight.dtype, layer.paca_delta.dtype, layer.paca_delta.grad.dtype) == (weight, delta, delta)
    assert torch.equal(layer.paca_delta, before.to(delta))
    assert layer.paca_indices.dtype == torch.int64
    assert torch.equal(layer.paca_indices, INDICES)
    assert torch.equal(layer.weight, expected_weight(layer))


def test_a_cast_base_is_restored_as_the_base_would_have_been_cast() -> None:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT)
    layer, _ = layer_and_twin()
    layer.load_state_dict(base.state_dict(), strict=False)
    layer.to(torch.bfloat16)
    layer.restore_columns()
    assert torch.equal(layer.weight, base.weight.bfloat16())


def test_an_empty_move_keeps_the_indices_and_starts_the_delta_at_zero() -> None:
    base = nn.Linear(IN, OUT)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(IN, OUT))
    apply_paca(model, PaCAConfig(r=R, seed=3))
    model.to_empty(device="cpu")
    model.load_state_dict({f"0.{name}": value for name, value in base.state_dict().items()}, strict=False)

    expected = nn.Sequential(copy.deepcopy(base))
    apply_paca(expected, PaCAConfig(r=R, seed=3))
    assert torch.equal(model[0].paca_indices, expected[0].paca_indices)
    assert torch.equal(model[0].paca_delta, torch.zeros(OUT, R))
    assert torch.equal(model[0].weight, base.weight)
    assert torch.equal(model[0].paca_base_columns, base.weight[:, model[0].paca_indices])


def test_an_empty_move_of_a_trained_layer_keeps_delta_and_indices() -> None:
    layer, _ = layer_and_twin()
    delta = layer.paca_delta.detach().clone()
    layer.to_empty(device="cpu")
    assert torch.equal(layer.paca_indices, INDICES)
    assert torch.equal(layer.paca_delta, delta)


def test_a_copy_is_independent() -> None:
    layer, twin = layer_and_twin()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.paca_delta.add_(1)
    other.write_columns()
    assert torch.equal(layer.weight, twin.weight)
    assert not torch.equal(other.weight, twin.weight)
    assert torch.equal(other.weight, expected_weight(other))


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_saved_layer_comes_back(weights_only: bool) -> None:
    layer, _ = layer_and_twin()
    file = io.BytesIO()
    torch.save(layer.state_dict() if weights_only else layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=weights_only)
    if weights_only:
        other = PaCALinear(IN, OUT, r=R, alpha=ALPHA, indices=torch.tensor([0, 1, 4, 5]))
        other.load_state_dict(loaded)
        loaded = other
    input = torch.randn(3, IN)
    assert torch.equal(loaded(input), layer(input))
    for name, value in layer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


# -- Loading


def test_a_base_checkpoint_replaces_the_base_under_the_delta() -> None:
    layer, _ = layer_and_twin()
    base = nn.Linear(IN, OUT)
    result = layer.load_state_dict(base.state_dict(), strict=False)
    assert sorted(result.missing_keys) == ["paca_base_columns", "paca_delta", "paca_indices"]
    assert torch.equal(layer.paca_base_columns, base.weight[:, INDICES])
    expected = base.weight.detach().clone()
    expected[:, INDICES] = expected[:, INDICES].add(layer.paca_delta.detach(), alpha=ALPHA / R)
    assert torch.equal(layer.weight, expected)
    layer.restore_columns()
    assert torch.equal(layer.weight, base.weight)


def test_a_full_checkpoint_brings_indices_and_base_columns_along() -> None:
    layer, _ = layer_and_twin()
    other = PaCALinear(IN, OUT, r=R, alpha=ALPHA, indices=torch.tensor([0, 1, 4, 5]))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    other.restore_columns()
    layer.restore_columns()
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("theirs", [INDICES, torch.tensor([0, 1, 3, 5])], ids=["same indices", "other indices"])
def test_an_adapter_moves_the_layer_to_its_columns_and_restores_those_left(theirs: Tensor) -> None:
    layer, _ = layer_and_twin()
    base = nn.Linear(IN, OUT)
    layer.load_state_dict(base.state_dict(), strict=False)
    delta = torch.randn(OUT, R)
    layer.load_state_dict({"paca_indices": theirs, "paca_delta": delta}, strict=False)
    expected = base.weight.detach().clone()
    expected[:, theirs] = expected[:, theirs].add(delta, alpha=ALPHA / R)
    assert torch.equal(layer.weight, expected)
    layer.restore_columns()
    assert torch.equal(layer.weight, base.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_on_meta_takes_its_weights_from_a_base_checkpoint(assign: bool) -> None:
    base = nn.Linear(IN, OUT)
    layer = PaCALinear(IN, OUT, device="meta", r=R, indices=INDICES)
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(base.state_dict(), strict=False, assign=assign)
    assert torch.equal(layer.paca_base_columns, base.weight[:, INDICES])
    assert torch.equal(layer.paca_delta, torch.zeros(OUT, R))
    layer.write_columns()
    assert torch.equal(layer.weight, base.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paca_delta": None}, "The checkpoint has paca_indices of 'up' but not its paca_delta. It is incomplete."),
        ({"paca_indices": None}, "The checkpoint has paca_delta of 'up' but not its paca_indices. It is incomplete."),
        ({"paca_delta": torch.zeros(OUT, 3)}, r"The delta of 'up' has shape \(16, 3\) in the checkpoint and \(16, 4\)"),
        ({"paca_indices": torch.tensor([1, 2, 3, 24])}, "'up' reach from 1 to 24, outside the 24 input columns"),
        ({"paca_indices": torch.tensor([1, 3, 2, 4])}, "'up' are not sorted and unique"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change: dict[str, Tensor | None], message: str) -> None:
    layer, _ = layer_and_twin()
    adapter = {"paca_indices": INDICES, "paca_delta": torch.zeros(OUT, R)} | change
    state = {f"up.{name}": value for name, value in adapter.items() if value is not None}
    with pytest.raises(PaCAError, match=message):
        nn.ModuleDict({"up": layer}).load_state_dict(state, strict=False)


@pytest.mark.parametrize("r", [0, -1, IN + 1])
def test_a_rank_that_does_not_fit_is_refused(r: int) -> None:
    with pytest.raises(PaCAError, match=rf"r={r} must lie between 1 and in_features=24"):
        PaCALinear(IN, OUT, r=r)


def test_a_layer_built_by_hand_can_be_merged() -> None:
    layer, twin = layer_and_twin()
    model = merge(nn.Sequential(layer))
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, twin.weight)


def test_the_layers_of_a_model_are_found_once_each() -> None:
    shared = PaCALinear(IN, IN, r=R)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert list(paca_layers(model)) == [("0", shared)]


def test_the_layer_prints_its_rank_and_scaling() -> None:
    layer, _ = layer_and_twin()
    assert repr(layer) == "PaCALinear(in_features=24, out_features=16, bias=True, r=4, scaling=1.5)"


def test_compiles_where_layers_differ_in_their_scaling() -> None:
    """Then torch.compile makes the scaling symbolic."""
    eager = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    apply_paca(eager, PaCAConfig(r=2, alpha_pattern={"0": 3.0, "1": 5.0, "2": 7.0}))
    compiled = copy.deepcopy(eager)
    for layer in compiled:
        layer.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8)
    eager(x).sum().backward()
    compiled(x).sum().backward()
    for (_, expected), (_, layer) in zip(paca_layers(eager), paca_layers(compiled), strict=True):
        torch.testing.assert_close(layer.paca_delta.grad, expected.paca_delta.grad)
