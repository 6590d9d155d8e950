"""Optimizers of many kinds train what they would train in a plain reference, or say why they would not."""

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import pytorch_optimizer
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call

from paca_lightning import PaCAConfig, PaCAStrategy, apply_paca, attach, paca_layers
from tests.callbacks.test_paca import DATA, Module, in_step, loader, network, trainer  # noqa: F401  (a fixture)

CONFIG = PaCAConfig(r=4, alpha=8)
LABELS = torch.randn(len(DATA), 8, generator=torch.Generator().manual_seed(2))
Batch = tuple[Tensor, Tensor]
BATCHES: list[Batch] = list(zip(DATA.double().split(8), LABELS.double().split(8), strict=True))


# ---- optimizers of kinds that do not come with PyTorch


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (arXiv 2010.01412), with the method names that its implementations share."""

    def __init__(self, params: Any, base: type[torch.optim.Optimizer] = torch.optim.SGD, rho: float = 0.1, **kw: Any):
        super().__init__(params, {"rho": rho, **kw})
        self.base_optimizer = base(self.param_groups, **kw)

    @torch.no_grad()
    def first_step(self) -> None:
        grads = [(p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([grad.norm() for _, grad in grads]).norm()
        for p, grad in grads:
            self.state[p]["before"] = p.detach().clone()
            p.add_(grad * (self.param_groups[0]["rho"] / norm))
            p.grad = None

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p].pop("before")  # a write that no version counter sees
        self.base_optimizer.step()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        assert closure is not None
        with torch.enable_grad():
            loss = closure()
            self.first_step()
            closure()
        self.second_step()
        return loss


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (arXiv 2405.15682): parameters are y while training and the average x in evaluation."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})
        self.count, self.training = 0, True

    @torch.no_grad()
    def _swap(self, training: bool, weight: Callable[[float], float]) -> None:
        if self.training != training:
            for group in self.param_groups:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight(group["beta"]))
            self.training = training

    def eval(self) -> None:
        self._swap(False, lambda beta: 1 - 1 / beta)

    def train(self) -> None:
        self._swap(True, lambda beta: 1 - beta)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        assert self.training
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, 1 / self.count)
                p.sub_(p.grad, alpha=group["lr"] * (1 - group["beta"] * (1 - 1 / self.count)))
                z.sub_(p.grad, alpha=group["lr"])
        return loss


class Lookahead(torch.optim.Optimizer):
    """Lookahead (arXiv 1907.08610) around an optimizer: moves the parameters once more after the inner step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = self.optimizer.step(closure)  # type: ignore[arg-type]
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", torch.zeros_like(p))
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


# ---- the reference: weights as a function of the deltas


class Reference:
    """The same network, with weights computed from the deltas in every forward: no write-back is needed."""

    def __init__(self) -> None:
        self.net, converted = network().double().requires_grad_(False), network().double()
        apply_paca(converted, CONFIG)
        self.layers = {path: (layer.paca_indices, layer.scaling) for path, layer in paca_layers(converted)}
        self.deltas = {path: nn.Parameter(torch.zeros_like(layer.paca_delta)) for path, layer in paca_layers(converted)}

    def __call__(self, x: Tensor) -> Tensor:
        weights = {}
        for path, (indices, scaling) in self.layers.items():
            weight = self.net.get_submodule(path).weight
            weights[f"{path}.weight"] = weight.index_add(1, indices, scaling * self.deltas[path])
        return functional_call(self.net, weights, (x,))


class Converted:
    """The network as PaCA trains it."""

    def __init__(self) -> None:
        self.net = network().double()
        apply_paca(self.net, CONFIG)
        self.deltas = {path: layer.paca_delta for path, layer in paca_layers(self.net)}

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x)


def loss_of(model: Any, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def one_gradient(model: Any, optimizer: torch.optim.Optimizer) -> None:
    for batch in BATCHES:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def with_closure(model: Any, optimizer: torch.optim.Optimizer) -> None:
    for batch in BATCHES:

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


def two_steps(model: Any, optimizer: Any) -> None:
    for batch in BATCHES:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.first_step()
        loss_of(model, batch).backward()
        optimizer.second_step()


def swapping(model: Any, optimizer: Any) -> None:
    for batch in BATCHES:
        optimizer.train()
        one_gradient(model, optimizer)
        optimizer.eval()
        with torch.no_grad():
            loss_of(model, batch)


def soap(parameters: list[nn.Parameter], lr: float = 0.05) -> pytorch_optimizer.SOAP:
    """Of its package, on the side of the columns alone: the layers have 8 and 32 outputs."""
    return pytorch_optimizer.SOAP(
        parameters,
        lr=lr,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        shampoo_beta=0.95,
        precondition_frequency=2,
        max_precondition_dim=CONFIG.r,
    )


KINDS: dict[str, tuple[Callable[[list[nn.Parameter]], Any], Callable[[Any, Any], None]]] = {
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.05), one_gradient),
    "fused AdamW": (lambda p: torch.optim.AdamW(p, lr=0.05, fused=True), one_gradient),
    "LBFGS": (lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=5), with_closure),
    "LBFGS with line search": (lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"), with_closure),
    "SAM, two steps": (lambda p: SAM(p, lr=0.05), two_steps),
    "SAM, closure": (lambda p: SAM(p, lr=0.05), with_closure),
    "schedule-free": (lambda p: ScheduleFree(p, lr=0.05), swapping),
    "pytorch-optimizer's SOAP": (soap, one_gradient),
    "Lookahead": (lambda p: Lookahead(torch.optim.Adam(p, lr=0.05)), one_gradient),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_trains_what_it_trains_in_the_reference(kind: str) -> None:
    build, run = KINDS[kind]
    reference, converted = Reference(), Converted()
    run(reference, build(list(reference.deltas.values())))
    optimizer = build(list(converted.deltas.values()))
    attach(optimizer, converted.net)
    run(converted, optimizer)
    assert in_step(converted.net)
    for path, delta in converted.deltas.items():
        assert delta.abs().max() > 1e-3
        # Double precision: the gradients come from GEMMs of other shapes, and LBFGS amplifies small differences.
        torch.testing.assert_close(delta, reference.deltas[path], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(loss_of(converted, BATCHES[0]), loss_of(reference, BATCHES[0]), rtol=1e-6, atol=1e-9)


def test_a_removed_handle_writes_no_more() -> None:
    converted = Converted()
    optimizer = ScheduleFree(list(converted.deltas.values()), lr=0.05)
    handle = attach(optimizer, converted.net)
    one_gradient(converted, optimizer)
    handle.remove()
    optimizer.eval()
    assert not in_step(converted.net)


# ---- wrappers


class ManualSAM(Module):
    """Two steps a batch, through the optimizer that Lightning wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(self.net(batch).square().mean())
        optimizer.first_step()
        assert in_step(self.net)
        self.manual_backward(self.net(batch).square().mean())
        optimizer.second_step()
        assert in_step(self.net)
        optimizer.zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SAM([p for p in self.parameters() if p.requires_grad], lr=0.05)


def test_sam_through_lightnings_wrapper(trainer: Any) -> None:  # noqa: F811
    module = ManualSAM()
    trainer(PaCAStrategy(CONFIG)).fit(module, loader())
    assert any(layer.paca_delta.any() for _, layer in paca_layers(module))


@pytest.mark.parametrize("order", ["attach first", "set up first"])
def test_a_schedule_free_optimizer_in_fabric(order: str) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    converted = Converted()
    optimizer: Any = ScheduleFree(list(converted.deltas.values()), lr=0.05)
    if order == "attach first":
        attach(optimizer, converted.net)
    net, optimizer = fabric.setup(converted.net, optimizer)
    if order == "set up first":
        attach(optimizer, converted.net)
    for x, y in BATCHES:
        fabric.backward((net(x) - y).square().mean())
        optimizer.step()
        assert in_step(converted.net)
    before = converted.net[0].weight.clone()
    optimizer.eval()
    assert in_step(converted.net)
    assert not torch.equal(converted.net[0].weight, before)


def test_the_optimizer_that_accelerate_prepares() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    converted = Converted()
    optimizer = accelerator.prepare(torch.optim.SGD(list(converted.deltas.values()), lr=0.05))
    attach(optimizer, converted.net)
    accelerator.backward(loss_of(converted, BATCHES[0]))
    optimizer.step()
    assert all(delta.any() for delta in converted.deltas.values())
    assert in_step(converted.net)


def test_a_schedule_free_optimizer_of_its_package() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    reference, converted = Reference(), Converted()
    for model in (reference, converted):
        optimizer = schedulefree.AdamWScheduleFree(list(model.deltas.values()), lr=0.05)
        if model is converted:
            attach(optimizer, converted.net)
        swapping(model, optimizer)
    assert in_step(converted.net)
    torch.testing.assert_close(loss_of(converted, BATCHES[0]), loss_of(reference, BATCHES[0]), rtol=1e-6, atol=1e-9)


# ---- Adafactor

SMALL = r"Adafactor scales its steps .*they move by only 0.001 times the learning rate.*eps=\((None|1e-30), 1\.0\)"


@pytest.mark.parametrize(
    ("build", "small"),
    [
        (lambda p: torch.optim.Adafactor(p), True),
        (lambda p: torch.optim.Adafactor(p, eps=(None, 1.0)), False),
        (lambda p: transformers.Adafactor(p), True),
        (lambda p: transformers.Adafactor(p, eps=(1e-30, 1.0)), False),
        (lambda p: transformers.Adafactor(p, lr=1e-2, scale_parameter=False, relative_step=False), False),
    ],
)
def test_adafactor_moves_deltas_or_warns_that_it_hardly_does(build: Any, small: bool) -> None:
    converted = Converted()
    optimizer = build(list(converted.deltas.values()))
    if small:
        with pytest.warns(UserWarning, match=SMALL):
            attach(optimizer, converted.net)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attach(optimizer, converted.net)
    loss_of(converted, BATCHES[0]).backward()
    optimizer.step()
    size = max(float(delta.detach().square().mean().sqrt()) for delta in converted.deltas.values())
    # Of a first step: 1e-2 is the learning rate of both, or the largest relative step.
    assert size == pytest.approx(1e-5 if small else 1e-2, rel=0.3)


def test_adafactor_without_a_learning_rate_in_lightning(trainer: Any) -> None:  # noqa: F811
    class WithAdafactor(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return transformers.Adafactor([p for p in self.parameters() if p.requires_grad], eps=(1e-30, 1.0))

    callback = PaCAStrategy(CONFIG)
    module = WithAdafactor()
    trainer(callback).fit(module, loader())
    assert in_step(module)
    assert callback.report is not None
    assert callback.report.learning_rate is None
