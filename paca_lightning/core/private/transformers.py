"""Private APIs of transformers (read in 5.23)."""

import copy
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

GROUPED_PRODUCTS = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})
"""Names of the functions by which experts multiply sorted tokens: PyTorch's, what it calls, and transformers' own."""


def experts_implementation(config: Any) -> str | None:
    """The forward of experts that a model runs: the public argument can be set, but not read."""
    return getattr(config, "_experts_implementation", None)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts and dispatches to transformers' forwards of them."""
    return all(hasattr(module, name) for name in ("num_experts", "has_gate", "is_transposed"))


def splits_experts(module: nn.Module) -> bool:
    """Whether transformers has spread a module's experts over devices; it tells nobody else."""
    return bool(getattr(module, "_is_expert_parallel", False))


def is_llama_norm(module: nn.Module) -> bool:
    """Whether a module's class computes what ``LlamaRMSNorm`` does: of 192 norms in transformers, 140 have its code."""
    if not hasattr(module, "variance_epsilon"):  # before an import that takes a second
        return False
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    code, wanted = getattr(type(module).forward, "__code__", None), LlamaRMSNorm.forward.__code__
    return all(getattr(code, each, None) == getattr(wanted, each) for each in ("co_code", "co_names", "co_consts"))


def peft_takes_for_experts(config: Any) -> frozenset[str]:
    """Names of linear layers that PEFT (0.21) takes for parts of stacked experts, in a model with a configuration.

    In transformers 4 experts had these names. By transformers' table of how checkpoints are read, PEFT rewrites them in
    every adapter, also where they mean the dense layers and shared experts that have the same names today.
    """
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as PATTERNS

    kind = getattr(config, "model_type", None)
    names = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}
    return frozenset(names.get("mixtral" if kind == "mixtral" else PATTERNS.get(str(kind), ""), ()))


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of a model that a checkpoint holds in parts, one or several for each of its rows on dim 0.

    Attributes:
        rule: Of transformers, that makes the tensor.
        parts: Names in the checkpoint, those of one kind in the order of the rows, by kind.
    """

    rule: Any
    parts: dict[str, list[str]] = field(default_factory=dict)

    @staticmethod
    def can_follow(rule: Any) -> bool:
        """Whether a rule stacks tensors on dim 0, and then works on each of them alone."""
        first, *others = rule.operations
        dims = [dim for each in others for dim in (getattr(each, name, 1) for name in ("dim", "dim0", "dim1"))]
        known = all(type(each).__name__ in ("Concatenate", "Transpose") for each in others)
        return type(first).__name__ == "MergeModulelist" and first.dim == 0 and known and 0 not in dims

    def merge(self, parts: dict[str, list[Tensor]]) -> Tensor:
        """Some rows of the tensor, from the parts of these rows."""
        found: Any = dict(parts)
        patterns = {"source_patterns": self.rule.source_patterns, "target_patterns": self.rule.target_patterns}
        for operation in self.rule.operations:
            found = operation.convert(found, **patterns)
        (tensor,) = found.values()
        result: Tensor = tensor[0] if isinstance(tensor, list) else tensor
        return result


def names_in_model(
    model: nn.Module, names: Sequence[str], wanted: Container[str]
) -> tuple[dict[str, str], dict[str, MergedTensor]]:
    """How transformers reads tensors of a checkpoint that a model has under other names, or merged into one tensor.

    ``from_pretrained`` applies these rules to whole tensors; it has no public way to some rows of them. Rules that do
    more than stack experts, and then work on each of them alone, are left out.

    Args:
        model: A Hugging Face model.
        names: Of the checkpoint's tensors.
        wanted: Of the model's.

    Returns:
        The checkpoint's name by the model's, for tensors of other names; and the merged tensors by the model's name.
    """
    from torch.distributed.fsdp import FSDPModule
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    if isinstance(model, FSDPModule):  # whose class is one of FSDP2, which transformers takes for custom code
        with torch.device("meta"):
            model = type(model)(copy.deepcopy(model.config))
    rules = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    renamed: dict[str, str] = {}
    merged: dict[str, MergedTensor] = {}
    for name in sorted(names, key=loading.dot_natural_key):
        if name in wanted:
            continue
        target, pattern = loading.rename_source_key(name, renamings, converters)
        if target not in wanted:
            continue
        if pattern is None:
            renamed[target] = name
        elif MergedTensor.can_follow(rule := by_pattern[pattern]):
            merged.setdefault(target, MergedTensor(rule)).parts.setdefault(pattern, []).append(name)
    return renamed, merged


def is_pretrained_model(module: nn.Module) -> bool:
    """Whether a module is a Hugging Face model, told without importing transformers."""
    return hasattr(module, "_no_split_modules")


def block_classes(module: nn.Module) -> set[str]:
    """Class names of a Hugging Face model's repeated blocks, which it declares for ``device_map``; else empty."""
    return set(getattr(module, "_no_split_modules", None) or ())


def initialises(module: nn.Module) -> bool:
    """Whether ``initialise`` can be called with a module as the model."""
    return hasattr(module, "_init_weights")


def initialise(model: nn.Module, module: nn.Module) -> None:
    """Give one module inside a Hugging Face model its initial weights and buffers.

    The public ``init_weights()`` does so for the whole model, skips loaded weights by flags of its own, and ties again.
    """
    model._init_weights(module)  # type: ignore[operator]


def ignored_keys(module: nn.Module) -> set[str]:
    """Patterns of tensors in a checkpoint that a Hugging Face model declares unused; else empty."""
    return set(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())


def attention_of(config: Any) -> str:
    """The attention implementation that a model runs, such as ``sdpa``: the public argument can be set, but not read.

    Without a value, transformers chooses SDPA where a model has it.
    """
    return config._attn_implementation or "sdpa"


@contextmanager
def packing_not_detected() -> Iterator[None]:
    """Inside, models take each row for one document.

    Fake tensors have no values from which to see that positions restart, and transformers then builds the mask that
    packed rows need. No argument says that rows are not packed.
    """
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


@contextmanager
def templates_compiled_by(compile: Callable[[str, Any], Any]) -> Iterator[None]:
    """Inside, ``apply_chat_template`` renders what ``compile`` makes of a source and an environment.

    The environment is that of transformers. It is built where templates are compiled, and no argument
    takes another one.
    """
    from transformers.utils import chat_template_utils

    utils: Any = chat_template_utils

    original = utils._compile_jinja_template
    environment = original("").environment
    utils._compile_jinja_template = lambda source: compile(source, environment)
    try:
        yield
    finally:
        utils._compile_jinja_template = original
