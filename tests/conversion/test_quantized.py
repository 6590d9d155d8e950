"""Weights that other libraries quantized are refused by name, with what works, and the model stays as it was."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from paca_lightning import PaCAConfig, PaCAError, apply_paca
from tests.tiny import tiny_llama

REMEDY = r"Load the unquantized model and set quantize='nf4', or load it by bitsandbytes in 4 bits \(nf4\)"


class Packed(nn.Module):
    """A layer as GPTQ's and AWQ's are: no ``nn.Linear``, and the weight in integers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, linear.out_features))


class Int8Tensor(Tensor):
    """A weight as torchao's are: a subclass that shows the dtype from before."""


Int8Tensor.__module__ = "torchao.quantization"


def in_8_bits(linear: nn.Linear) -> nn.Module:
    return bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)


def by_torchao(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Int8Tensor), requires_grad=False)  # type: ignore[arg-type]
    return linear


SCHEMES: dict[str, tuple[Any, str]] = {
    "bitsandbytes": (in_8_bits, "its weight is quantized to 8 bits by bitsandbytes"),
    "torchao": (by_torchao, r"its weight is quantized by torchao \(Int8Tensor\)"),
    "gptq": (Packed, r"Packed holds a quantized weight \('qweight'\)"),
}


def quantized(scheme: str) -> nn.Module:
    model = tiny_llama()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            model.set_submodule(path, SCHEMES[scheme][0](module))
    return model


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_refused_by_name_with_what_works(scheme: str, target_modules: Any) -> None:
    model = quantized(scheme)
    before = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(PaCAError, match=rf"q_proj.*{SCHEMES[scheme][1]}\. {REMEDY}"):
        apply_paca(model, PaCAConfig(r=4, target_modules=target_modules))
    assert {path: type(module) for path, module in model.named_modules()} == before


def test_one_such_layer_is_left_alone_and_reported() -> None:
    model = tiny_llama()
    path = "model.layers.0.self_attn.q_proj"
    model.set_submodule(path, by_torchao(model.get_submodule(path)))  # type: ignore[arg-type]
    report = apply_paca(model, PaCAConfig(r=4))
    assert "quantized by torchao" in report.skipped[path]
    assert len(report.layers) == 13
