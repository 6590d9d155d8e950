"""Private APIs of transformers (read in 5.23)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

GROUPED_PRODUCTS = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})
"""Names of the functions by which experts multiply sorted tokens: PyTorch's, what it calls, and transformers' own."""


def experts_implementation(config: Any) -> str | None:
    """The forward of experts that a model runs: the public argument can be set, but not read."""
    return getattr(config, "_experts_implementation", None)


def splits_experts(module: nn.Module) -> bool:
    """Whether transformers has spread a module's experts over devices; it tells nobody else."""
    return bool(getattr(module, "_is_expert_parallel", False))


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
