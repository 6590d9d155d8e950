"""PEFT's LoRA and DoRA on the layers that PaCA would train, with about as many parameters or at a given rank."""

from torch import nn

from paca_lightning.conversion.targets import Target, in_features_of
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.transformers import peft_takes_for_experts
from paca_lightning.layers.experts import ExpertWeight


def lora_rank(r: int, inputs: int, outputs: int) -> int:
    """Rank at which LoRA trains about as many parameters as PaCA at rank ``r``.

    LoRA has ``rank * (inputs + outputs)`` of them in a layer, PaCA ``r * outputs``.
    """
    return max(1, round(r * outputs / (inputs + outputs)))


def features_of(targets: list[Target]) -> tuple[int, int]:
    """Sums of the input and output features of layers; of stacked experts, each is a layer."""
    inputs = outputs = 0
    for module in (target.module for target in targets):
        columns = in_features_of(module)
        inputs += columns * (module.experts if isinstance(module, ExpertWeight) else 1)
        outputs += module.get_parameter("weight").numel() // columns
    return inputs, outputs


def split_targets(targets: list[Target]) -> tuple[list[str], list[str]]:
    """Paths of layers, and of stacked experts: PEFT's ``target_modules`` and ``target_parameters``."""
    dense: list[str] = []
    stacked: list[str] = []
    for target in targets:
        (stacked if isinstance(target.module, ExpertWeight) else dense).append(target.path)
    return dense, stacked


def check_names(model: nn.Module, dense: list[str]) -> None:
    """Refuse LoRA on layers that PEFT would take for parts of stacked experts.

    Raises:
        PaCAError: If there are such layers.
    """
    taken = peft_takes_for_experts(getattr(model, "config", None))
    if mistaken := [path for path in dense if path.rpartition(".")[2] in taken]:
        raise PaCAError(
            f"PEFT (0.21) takes {mistaken[0]!r} ({len(mistaken)} such layers) for a part of stacked experts, by its "
            "name and the type of the model. Leave LoRA and DoRA out."
        )


def add_lora(
    model: nn.Module, r: int, targets: list[Target], *, use_dora: bool = False, fp32_adapters: bool = True
) -> nn.Module:
    """A model with PEFT's adapters: scaling 1, no dropout, in fp32 as is PEFT's default.

    Args:
        model: Is changed.
        r: Rank.
        targets: The layers, of a model built alike.
        use_dora: Train the norms of the weight's rows, too.
        fp32_adapters: Otherwise adapters have the model's dtype.

    Raises:
        PaCAError: If PEFT is not installed, would adapt other layers, or DoRA is asked for on stacked experts.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise PaCAError(
            "LoRA and DoRA need PEFT, which is not installed. Run: pip install 'paca-lightning[bench]'."
        ) from error
    dense, stacked = split_targets(targets)
    check_names(model, dense)
    if stacked and use_dora:
        raise PaCAError(f"PEFT's DoRA cannot adapt stacked experts such as {stacked[0]!r} (0.21). Leave dora out.")
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        lora_dropout=0.0,
        target_modules=dense,
        target_parameters=stacked or None,
        use_dora=use_dora,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)
