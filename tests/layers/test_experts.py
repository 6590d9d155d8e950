"""Stacked experts: the gradient of their columns in each forward of transformers, and what a step keeps and writes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paca_lightning import PaCAConfig, PaCAError, apply_paca, attach, disable_paca, paca_layers, write_columns
from paca_lightning.activation_checkpointing.blocks import checkpoint_blocks, find_blocks
from paca_lightning.layers.expert_taps import TappedWeight
from paca_lightning.layers.experts import PaCAExperts
from paca_lightning.tasks.decoder_blocks import checkpoint_activations
from tests.moe import MODELS, tiny_moe, tokens

FORWARDS = ("eager", "batched_mm", "grouped_mm")
EXPERTS = PaCAConfig(r=4, alpha=8, target_modules=["experts.gate_up_proj", "experts.down_proj"])


def loss_of(model: Any, seed: int = 0) -> Tensor:
    ids = tokens(seed)
    return model(input_ids=ids, labels=ids).loss


def converted(model: nn.Module, config: PaCAConfig = EXPERTS) -> dict[str, PaCAExperts]:
    """The experts of a model, with random deltas."""
    apply_paca(model, config)
    layers = {path: layer for path, layer in paca_layers(model) if isinstance(layer, PaCAExperts)}
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        layer.paca_delta.data.copy_(0.05 * torch.randn(layer.paca_delta.shape, generator=generator))
    write_columns(model)
    return layers


def dense_twin(model: nn.Module, layers: dict[str, PaCAExperts]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The model before its conversion with the present weights, those of its experts trained whole."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for layer in [child for child in module.children() if isinstance(child, PaCAExperts)]:
            layer.release(trained=True)
    parameters = dict(twin.requires_grad_(False).named_parameters())
    weights = {path: parameters[layer.base_path(path)].requires_grad_(True) for path, layer in layers.items()}
    assert not any("paca" in name for name in parameters)
    return twin, weights


def columns_of(gradient: Tensor | None, layer: PaCAExperts) -> Tensor:
    """The part of a dense gradient that a delta gets."""
    assert gradient is not None
    rows = gradient.mT if layer.transposed else gradient
    return layer.scaling * rows[..., layer.paca_indices]


def difference(value: Tensor | None, expected: Tensor) -> float:
    assert value is not None
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_columns_of_the_dense_ones(kind: str, forward: str) -> None:
    dtype = torch.float32 if forward == "grouped_mm" else torch.float64  # for which PyTorch has no grouped product
    model = tiny_moe(kind, forward).to(dtype)
    layers = converted(model)
    twin, weights = dense_twin(model, layers)
    loss, expected = loss_of(model), loss_of(twin)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert len(layers) == (2 if "deepseek" in kind else 4)  # their first block has no experts
    for path, layer in layers.items():
        limit = 1e-6 if dtype == torch.float32 else 1e-12
        assert difference(layer.paca_delta.grad, columns_of(weights[path].grad, layer)) < limit, path
    untouched = [name for name, p in model.named_parameters() if p.grad is not None and "paca_delta" not in name]
    assert untouched == []  # routers above all


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_twenty_steps_are_those_of_a_masked_dense_model(kind: str, forward: str) -> None:
    model = tiny_moe(kind, forward)
    layers = converted(model)
    twin, weights = dense_twin(model, layers)
    before = loss_of(model).detach()
    for step in range(20):  # SGD on the delta moves the columns by scaling^2 times the learning rate
        for each in (model, twin):
            each.zero_grad()
            loss_of(each, step).backward()
        with torch.no_grad():
            for path, layer in layers.items():
                weight = weights[path]
                rows = weight.mT if layer.transposed else weight
                rows[..., layer.paca_indices] -= 0.02 * layer.scaling * columns_of(weight.grad, layer)
                layer.paca_delta -= 0.02 * layer.paca_delta.grad  # type: ignore[operator]
        write_columns(model)
    assert loss_of(model) < before
    for path, layer in layers.items():  # up to the rounding of a weight that is added up twenty times
        assert difference(layer.weight.detach(), weights[path].detach()) < 1e-6, path


@pytest.mark.parametrize("forward", FORWARDS)
def test_16_bits_and_autocast_train_as_the_dense_model(forward: str) -> None:
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, forward != "grouped_mm")):
        model = tiny_moe("mixtral", forward).to(dtype)
        layers = converted(model)
        twin, weights = dense_twin(model, layers)
        losses = []
        for each in (model, twin):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses.append(loss_of(each))
            losses[-1].backward()
        assert torch.equal(*losses)
        for path, layer in layers.items():
            assert layer.paca_delta.grad is not None
            assert layer.paca_delta.grad.dtype == torch.float32
            assert difference(layer.paca_delta.grad, columns_of(weights[path].grad, layer).float()) < 1e-2


@pytest.mark.parametrize("forward", FORWARDS)
def test_only_the_columns_of_the_inputs_are_saved(forward: str) -> None:
    """The sizes that a backward keeps are those of the frozen model and r columns of each product's input."""

    def saved(model: nn.Module) -> int:
        sizes: dict[tuple[int, int], int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in weights:
                sizes[(storage.data_ptr(), tensor.numel())] = tensor.numel()
                kept.append(tensor)  # so that no address comes twice
            return tensor

        kept: list[Tensor] = []
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        model.get_input_embeddings().register_forward_hook(lambda m, i, o: o.requires_grad_(True))  # type: ignore[operator]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss_of(model)
        return sum(sizes.values())

    frozen = saved(tiny_moe("mixtral", forward).requires_grad_(False))
    model = tiny_moe("mixtral", forward)
    apply_paca(model, EXPERTS)
    blocks, weights, pairs = 2, 2, 2 * 24  # two experts of each token
    few = blocks * weights * pairs  # such as the expert of each pair
    assert 0 < saved(model) - frozen <= blocks * weights * pairs * EXPERTS.r + few


def test_nothing_is_tapped_where_nothing_is_trained() -> None:
    model = tiny_moe("mixtral")
    owner = model.model.layers[0].mlp.experts
    seen: list[type] = []
    owner.register_forward_pre_hook(lambda module, _: seen.append(type(module.down_proj)))
    apply_paca(model, EXPERTS)
    owner.register_forward_pre_hook(lambda module, _: seen.append(type(module.down_proj)))
    loss_of(model)
    assert seen == [nn.Parameter, TappedWeight]
    seen.clear()
    with torch.no_grad():
        loss_of(model)
    with disable_paca(model):
        loss_of(model)
    for _, layer in paca_layers(model):
        layer.paca_delta.requires_grad_(False)
    loss_of(model)
    assert set(seen) == {nn.Parameter}
    assert isinstance(owner.down_proj, nn.Parameter)


def test_a_forward_that_fails_leaves_the_parameter_in_its_place() -> None:
    model = tiny_moe("mixtral")
    apply_paca(model, EXPERTS)
    owner = model.model.layers[0].mlp.experts
    with pytest.raises(RuntimeError):
        owner(torch.zeros(3, 7), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
    assert isinstance(owner.gate_up_proj, nn.Parameter)


def test_other_deltas_are_differentiated_as_plain_torch_does() -> None:
    model = tiny_moe("gpt_oss", "eager").double()
    layers = converted(model)
    loss_of(model).backward()
    deltas = {f"{path}.paca_delta": layer.paca_delta.detach().clone() for path, layer in layers.items()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        ids = tokens()
        result: Tensor = torch.func.functional_call(model, values, (), {"input_ids": ids, "labels": ids}).loss
        return result

    for delta in deltas.values():
        delta.requires_grad_(True)
    loss(deltas).backward()
    for path, layer in layers.items():
        assert difference(deltas[f"{path}.paca_delta"].grad, layer.paca_delta.grad) < 1e-12  # type: ignore[arg-type]


def test_a_second_derivative_is_refused() -> None:
    for forward in FORWARDS:
        model = tiny_moe("mixtral", forward)
        converted(model)
        with pytest.raises(PaCAError, match="create_graph=True"):
            loss_of(model).backward(create_graph=True)


@pytest.mark.parametrize("selective", [False, True])
def test_activation_checkpointing_changes_no_gradient(selective: bool) -> None:
    model = tiny_moe("mixtral")
    layers = converted(model)
    loss_of(model).backward()
    expected = {path: layer.paca_delta.grad for path, layer in layers.items()}
    model.zero_grad()
    checkpoint_blocks(find_blocks(model), selective=selective)
    loss_of(model).backward()
    for path, layer in layers.items():
        assert torch.equal(layer.paca_delta.grad, expected[path])  # type: ignore[arg-type]


IN_ONE_GRAPH = pytest.mark.xfail(
    torch.__version__.startswith("2.10."),
    raises=RuntimeError,
    reason="torch 2.10 cannot trace a hook that takes from a module's __dict__, nor GPT-OSS' bias, added in place",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "forward", "recomputed"),
    [
        ("mixtral", "eager", False),
        pytest.param("mixtral", "batched_mm", False, marks=IN_ONE_GRAPH),
        pytest.param("mixtral", "grouped_mm", False, marks=IN_ONE_GRAPH),
        ("mixtral", "grouped_mm", True),
        pytest.param("deepseek_v2", "grouped_mm", False, marks=IN_ONE_GRAPH),
        pytest.param("gpt_oss", "grouped_mm", False, marks=IN_ONE_GRAPH),
    ],
)
def test_compiled_blocks_train_as_eager_ones(kind: str, forward: str, recomputed: bool) -> None:
    """Bitwise, over steps with other tokens in number: loops over experts break the graph, other forwards do not."""
    torch.compiler.reset()
    states = []
    size = {"num_hidden_layers": 1} if kind == "mixtral" else {}  # its layers are alike
    for compiled in (False, True):
        model = tiny_moe(kind, forward, **size)
        layers = converted(model)
        if recomputed:
            checkpoint_activations(model, True)
        for block in find_blocks(model) if compiled else ():
            block.compile(backend="aot_eager", fullgraph=forward != "eager" and not recomputed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        handle = attach(optimizer, model)
        for step, length in enumerate((12, 12, 9)):
            ids = tokens(step, length=length)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        handle.remove()
        states.append({path: layer.paca_delta.detach() for path, layer in layers.items()})
    assert all(torch.equal(delta, states[1][path]) for path, delta in states[0].items())


@pytest.mark.slow
@IN_ONE_GRAPH
def test_inductor_gives_experts_the_same_gradients() -> None:
    torch.compiler.reset()
    model = tiny_moe("mixtral", num_hidden_layers=1)
    layers = converted(model)
    loss_of(model).backward()
    expected = {path: layer.paca_delta.grad for path, layer in layers.items()}
    model.zero_grad()
    for block in find_blocks(model):
        block.compile(fullgraph=True)
    loss_of(model).backward()
    for path, layer in layers.items():
        assert difference(layer.paca_delta.grad, expected[path]) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: torch.add(weight, 1),
        lambda weight: torch.einsum("eoi,ti->eto", weight, torch.zeros(3, 32)),
        lambda weight: weight[1:],
        lambda weight: weight.reshape(-1),
        lambda weight: weight.to("cpu"),
        lambda weight: torch.nn.functional.linear(torch.zeros(3, 96), weight[0].t()),
        lambda weight: torch.bmm(torch.zeros(4, 3, 32), weight.mT),
    ],
)
def test_a_use_of_the_weight_without_a_tap_is_refused(use: Any) -> None:
    model = tiny_moe("mixtral")
    layer = next(iter(converted(model).values()))
    weight = layer()
    assert isinstance(weight, TappedWeight)
    with pytest.raises(PaCAError, match=r"'model\.layers\.0\.mlp\.experts\.gate_up_proj' in a way that PaCA does not"):
        use(weight)
