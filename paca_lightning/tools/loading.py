"""A base model with its tokenizer, and an adapter on top."""

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from paca_lightning.adapter import load_adapter
from paca_lightning.errors import PaCAError
from paca_lightning.tasks.pretrained import build_causal_lm


def load_with_adapter(
    model: str, adapter: str | None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model, its tokenizer, and an adapter into it, in eval mode.

    Args:
        model: Hugging Face directory or hub id.
        adapter: Adapter directory. None: the base model alone.
        dtype: Of the weights: auto (as saved), float32, bfloat16 or float16.

    Raises:
        PaCAError: If one of them cannot be used.
    """
    built = build_causal_lm(model, dtype=dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise PaCAError(f"{model!r} has no tokenizer that can be loaded: {error}") from error
    if adapter is not None:
        load_adapter(built, adapter)
    return built.eval(), tokenizer
