"""A linear layer with a forward of its own is trained if it computes what nn.Linear computes, and refused if not."""

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from paca_lightning import PaCAConfig, apply_paca, attach, paca_layers, unload
from paca_lightning.conversion.forward_check import computes_as_linear
from paca_lightning.core.private.torch import fake_tensors


class Transposed(nn.Linear):
    """The same product, written in another way."""

    def forward(self, input: Tensor) -> Tensor:
        output = input @ self.weight.T
        return output if self.bias is None else output + self.bias


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Rounded(nn.Linear):
    """Fake quantization: equal for whole numbers only."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.round(), self.bias)


class StopsGradients(nn.Linear):
    """Equal in the forward, and not in the backward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.detach())


class Dropping(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(input, 0.5, self.training))


class WithLoRA(nn.Linear):
    """Has parameters of its own, which may become something."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.a, self.b = nn.Parameter(torch.randn(2, in_features)), nn.Parameter(torch.zeros(out_features, 2))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.a.T @ self.b.T


class NeedsItsShape(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.view(-1, self.in_features))


KINDS = {Transposed: True} | dict.fromkeys((Doubled, Rounded, StopsGradients, Dropping, WithLoRA, NeedsItsShape), False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_an_equal_forward_is_equal(kind: type[nn.Linear], device: str, bias: bool) -> None:
    torch.manual_seed(0)
    module = kind(8, 6, bias).to(device)
    state = torch.random.get_rng_state()
    before = copy.deepcopy(module.state_dict())
    assert computes_as_linear(module, nn.Linear) is KINDS[kind]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert device == "meta" or all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_the_check_holds_where_tensors_have_no_data() -> None:
    with fake_tensors():
        assert computes_as_linear(Transposed(8, 6), nn.Linear)
        assert not computes_as_linear(Doubled(8, 6), nn.Linear)
    with torch.inference_mode(), torch.device("meta"):
        assert computes_as_linear(Transposed(8, 6), nn.Linear)


def falcon() -> hf.FalconForCausalLM:
    torch.manual_seed(0)
    config = hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, bias=True)
    return hf.FalconForCausalLM(config).train()


def test_falcon_trains_in_its_own_arithmetic() -> None:
    ids = torch.arange(20).view(2, 10)
    plain, model = falcon(), falcon()
    report = apply_paca(model, PaCAConfig(r=4))
    assert len(report.layers) == 8
    assert torch.equal(model(ids).logits, plain(ids).logits)  # bitwise, in the two steps of its forward

    for each in (plain, model):
        each(ids, labels=ids).loss.backward()
    for path, layer in paca_layers(model):
        dense = plain.get_submodule(path).weight.grad[:, layer.paca_indices]
        torch.testing.assert_close(layer.paca_delta.grad, dense, rtol=1e-5, atol=1e-7)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    attach(optimizer, model)
    optimizer.step()
    assert not torch.equal(model(ids).logits, plain(ids).logits)
    unload(model)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert type(model.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FalconLinear"
