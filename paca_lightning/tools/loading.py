"""A base model with its tokenizer, and an adapter on top."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paca_lightning.adapter import load_adapter
from paca_lightning.adapter_files import adapter_config
from paca_lightning.errors import PaCAError
from paca_lightning.tasks.data.tokenizer import load_tokenizer
from paca_lightning.tasks.pretrained import build_causal_lm


def load_with_adapter(
    model: str,
    adapter: str | None,
    dtype: str = "auto",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model, its tokenizer, and an adapter into it, in eval mode.

    Args:
        model: Hugging Face directory or hub id.
        adapter: Adapter directory; a tokenizer in it is preferred to the model's, for its chat template is what the
            adapter was trained with. None: the base model alone.
        dtype: Of the weights: auto (as saved), float32, bfloat16 or float16.
        revision: Branch, tag or commit of the model on the hub, and of its tokenizer.
        trust_remote_code: Whether to run code that comes with either.

    Raises:
        PaCAError: If one of them cannot be used.
    """
    if adapter is not None:
        _check_adapter(adapter)
    built = build_causal_lm(model, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    if adapter is not None and Path(adapter, "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(adapter, trust_remote_code=trust_remote_code)
    else:
        tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    if adapter is not None:
        load_adapter(built, adapter)
    return built.eval(), tokenizer


def _check_adapter(adapter: str) -> None:
    """Find that there is no adapter before a large model is loaded."""
    if Path(adapter).is_file() or Path(adapter).suffix == ".ckpt":
        raise PaCAError(
            f"{adapter!r} is no adapter directory. The adapter of a checkpoint is written by its run's config with an "
            f"AdapterCheckpoint: paca-lightning fit --config ... --ckpt_path {adapter} --trainer.limit_train_batches=0"
        )
    adapter_config(adapter)
