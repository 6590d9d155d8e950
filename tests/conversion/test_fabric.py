"""Training loops without a Trainer: Fabric, and plain PyTorch."""

import lightning as L
import torch
from torch import nn

from paca_lightning import PaCAConfig, apply_paca, attach, paca_layers
from tests.callbacks.test_paca import CONFIG, DATA, in_step, moved, network, reference_deltas


def test_fabric_loop_equals_plain_pytorch() -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    net = nn.ModuleDict({"net": network()})
    apply_paca(net, CONFIG)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    attach(optimizer, net)
    model, optimizer = fabric.setup(net["net"], optimizer)
    for batch in DATA.split(4):
        fabric.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        assert in_step(net)
    expected = reference_deltas([[batch] for batch in DATA.split(4)])
    for path, layer in paca_layers(net["net"]):
        assert torch.equal(layer.paca_delta, expected[path])


def test_handle_ends_the_write_back() -> None:
    net = network()
    apply_paca(net, PaCAConfig(r=2))
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    handle = attach(optimizer, net)
    handle.remove()
    net(DATA).square().mean().backward()
    optimizer.step()
    assert moved(net)
    assert not in_step(net)
