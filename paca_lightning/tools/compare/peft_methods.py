"""Methods of the library PEFT, by the names of its own registry and by those that people use."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn
from typing_extensions import override

from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.conversion.linear4bit_base import quantize_base
from paca_lightning.conversion.targets import resolve
from paca_lightning.core.config import QUANTIZATIONS, PaCAConfig
from paca_lightning.core.errors import PaCAError, did_you_mean
from paca_lightning.tools.bench.lora import check_names, split_targets
from paca_lightning.tools.compare.methods import Method
from paca_lightning.tools.compare.own_methods import INSERTED, PROJECTED
from paca_lightning.tools.compare.task import Settings, Task

QUANTIZE = "quantize"
"""The one option that is no field of a PEFT config: ``nf4`` quantizes the frozen layers first, as PEFTStrategy does."""

ALIASES: dict[str, tuple[str, Settings]] = {
    "dora": ("lora", {"use_dora": True}),
    "qlora": ("lora", {QUANTIZE: "nf4"}),
    "rslora": ("lora", {"use_rslora": True}),
    "prefix": ("prefix_tuning", {}),
    "prompt": ("prompt_tuning", {}),
    "ptuning": ("p_tuning", {}),
    "llama-adapter": ("adaption_prompt", {}),
    "layernorm": ("ln_tuning", {}),
    "lntuning": ("ln_tuning", {}),
}
"""Names that people use: PEFT's name, and the fields that make the difference."""

SIZES = {"r": None, "num_virtual_tokens": 20, "adapter_len": 10, "n_frequency": None}
"""Fields that say how much is trained, and what they are where PEFT has no default."""

OWN = ("floor", "full", "paca", *INSERTED, *PROJECTED)
"""Names of the methods that are not PEFT's."""

ALPHAS = ("lora_alpha", "alpha")


@dataclass(frozen=True)
class PEFTMethod(Method):
    """A method of PEFT on the layers that PaCA would train, or on those that PEFT chooses for it.

    Attributes:
        peft_name: In PEFT's registry.
    """

    peft_name: str = ""

    @property
    def _class(self) -> type:
        return registry()[self.peft_name]

    @property
    def _fields(self) -> set[str]:
        return {one.name for one in dataclasses.fields(self._class)}

    @property
    @override
    def size_field(self) -> str | None:
        return next((name for name in SIZES if name in self._fields), None)

    def config(self, model: nn.Module, paca: PaCAConfig) -> Settings:
        """The fields of PEFT's config."""
        known, size = self._fields, self.size_field
        values: Settings = {}
        if size is not None and SIZES[size] is not None:
            values[size] = SIZES[size]
        if {"r", "target_modules"} <= known:
            dense, stacked = split_targets(resolve(take_inventory(model), paca).targets)
            values["target_modules"] = target_names(model, dense)
            if self.peft_name == "lora":
                check_names(model, dense)
                values |= {"target_parameters": stacked} if stacked else {}
        if "adapter_layers" in known:
            values["adapter_layers"] = model.config.num_hidden_layers  # type: ignore[union-attr]
        if "modules_to_save" in known and paca.modules_to_save:
            values["modules_to_save"] = list(paca.modules_to_save)
        values |= {name: value for name, value in self.options.items() if name != QUANTIZE}
        for alpha in ALPHAS:  # as PaCA's: scaling 1, whatever the rank
            if alpha in known and "r" in values:
                values.setdefault(alpha, values["r"])
        if type(model).__name__.endswith("ForCausalLM"):
            values.setdefault("task_type", "CAUSAL_LM")
        return values

    @override
    def left_frozen(self, task: Task) -> list[str]:
        if self.peft_name == "lora" or not {"r", "target_modules"} <= self._fields:
            return []
        return split_targets(resolve(take_inventory(task.model), task.paca).targets)[1]

    @override
    def callbacks(self, task: Task, seed: int) -> list[Settings]:
        config = {"class_path": f"peft.{self._class.__name__}", "init_args": self.config(task.model, task.paca)}
        quantize = {QUANTIZE: self.options[QUANTIZE]} if QUANTIZE in self.options else {}
        return [{"class_path": "paca_lightning.PEFTStrategy", "init_args": {"config": config} | quantize}]

    @override
    def apply(self, model: nn.Module, paca: PaCAConfig) -> nn.Module:
        import peft

        values = self.config(model, paca)
        if QUANTIZE in self.options:
            quantize_base(model)
        try:
            changed: nn.Module = peft.get_peft_model(model, self._class(**values))
        except (ValueError, TypeError) as error:
            raise PaCAError(f"Method {self.label!r}: PEFT refuses it: {error}") from error
        return changed


def registry() -> dict[str, type]:
    """The classes of PEFT's configs, by the names of methods.

    Raises:
        PaCAError: If PEFT is not installed.
    """
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise PaCAError(
            f"Methods other than {', '.join(OWN)} need PEFT, which is not installed. Run: pip install "
            "'paca-lightning[peft]'."
        ) from error
    return {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def peft_method(name: str, label: str, options: dict[str, Any]) -> PEFTMethod:
    """The method of that name.

    Raises:
        PaCAError: If there is none, or its config has no such field.
    """
    peft_name, own = ALIASES.get(name, (name, {}))
    known = registry()
    if peft_name not in known:
        names = [*OWN, *ALIASES, *sorted(known)]
        raise PaCAError(f"There is no method {name!r}.{did_you_mean(name, names)} Methods: {', '.join(names)}.")
    fields = [one.name for one in dataclasses.fields(known[peft_name])]
    for option, value in options.items():
        if option == QUANTIZE:
            if value not in QUANTIZATIONS:
                raise PaCAError(f"Method {label!r}: quantize={value!r} is unknown. Choose {QUANTIZATIONS[0]!r}.")
        elif option not in fields:
            meant = did_you_mean(option, fields)
            raise PaCAError(f"Method {label!r}: PEFT's {known[peft_name].__name__} has no field {option!r}.{meant}")
    return PEFTMethod(label, options=own | options, peft_name=peft_name)


def target_names(model: nn.Module, paths: list[str]) -> list[str]:
    """Layers by the last segments of their paths if these tell them from all others, else by their paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    matched = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in names}
    return names if matched == set(paths) else sorted(paths)
