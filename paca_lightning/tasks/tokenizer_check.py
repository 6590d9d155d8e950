"""Checks that the tokenizer and row length of the data fit the model."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from lightning.pytorch.utilities import rank_zero_warn
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import declared_new_tokens
from paca_lightning.tasks.instruction import InstructionDataModule
from paca_lightning.tasks.mmlu import MMLUDataModule
from paca_lightning.tasks.new_tokens import check_same_numbers
from paca_lightning.tasks.text_data import TextDataModule

_RENAMED = 0.01  # share of tokens, mostly reserved ones, that a copy of a tokenizer may rename


def check_data(datamodule: object, model: PreTrainedModel, name: str | None, revision: str | None = None) -> None:
    """Check a data module's `tokenizer` and `max_length`, if it has them, against the model.

    Args:
        datamodule: Any data module, or None.
        model: The model; its embeddings may be sharded or on the meta device.
        name: Directory or hub id of its weights; None for random weights.
        revision: Branch, tag or commit on the hub.

    Raises:
        PaCAError: If the tokenizer lacks new tokens of the model; or if a data module of this package makes token ids
            or positions without an embedding, or uses another model's vocabulary. For other data modules the latter
            are warnings, as their attributes may mean something else.
    """
    tokenizer = getattr(datamodule, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    check_same_numbers(tokenizer, declared_new_tokens(model))
    max_length = getattr(datamodule, "hparams", {}).get("max_length")
    misfit = tokenizer_misfit(tokenizer, model, name, revision)
    if misfit is None and isinstance(max_length, int):
        misfit = length_misfit(max_length, model)
    if misfit is None:
        return
    message = f"{type(datamodule).__name__} does not fit the model: {misfit}"
    if isinstance(datamodule, InstructionDataModule | MMLUDataModule | TextDataModule):
        raise PaCAError(message)
    rank_zero_warn(message)


def tokenizer_misfit(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str | None, revision: str | None = None
) -> str | None:
    """Why a tokenizer does not fit a model, as a sentence; None if it fits.

    Args:
        tokenizer: The tokenizer of the data.
        model: The model; its embeddings may be sharded or on the meta device.
        name: Directory or hub id of the model's weights. Its `tokenizer.json`, if there is one, is compared with the
            tokenizer. None for random weights, which fit any vocabulary.
        revision: Branch, tag or commit on the hub.
    """
    # Not from the weight's shape, as some strategies shard it.
    embeddings = getattr(model.get_input_embeddings(), "num_embeddings", float("inf"))
    unknown = {token: number for token, number in tokenizer.get_vocab().items() if number >= embeddings}
    if used := sorted((number, token) for token, number in unknown.items() if _may_occur(tokenizer, token, number)):
        return (
            f"the tokenizer {tokenizer.name_or_path!r} has {len(tokenizer):,} tokens, but the model has "
            f"{embeddings:,} embeddings: {used[0][1]!r} is number {used[0][0]:,}. Use the model's own tokenizer, or "
            "resize the model's embeddings and save both together."
        )
    if name is None or tokenizer.name_or_path == name or not tokenizer.is_fast:
        return None
    file = _tokenizer_file(name, revision)
    if file is None:
        return None
    try:
        own = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=False)
    except Exception:  # all that tokenizers raises; the data's tokenizer was read from another file
        return None
    given = tokenizer.get_vocab()
    others = sum(given.get(token) != number for token, number in own.items())
    if others > _RENAMED * len(own):
        return (
            f"the tokenizer {tokenizer.name_or_path!r} is another one than that of the model {name!r}: {others:,} of "
            f"its {len(own):,} tokens have another number or none, so the model would read other words. Use the "
            "model's own tokenizer."
        )
    return None


def length_misfit(max_length: int, model: PreTrainedModel) -> str | None:
    """Why rows of this length do not fit a model, as a sentence; None if they fit, as with rotary positions."""
    positions = learned_positions(model)
    if positions is None or max_length <= positions:
        return None
    return f"max_length is {max_length:,}, but the model has learned {positions:,} positions and no more: lower it."


def learned_positions(model: PreTrainedModel) -> int | None:
    """Number of learned position embeddings; None if positions are computed (rotary, ALiBi)."""
    limit = getattr(model.config, "max_position_embeddings", None)
    tables = {path.rpartition(".")[2]: part for path, part in model.named_modules() if isinstance(part, nn.Embedding)}
    rows = [table.num_embeddings for name, table in tables.items() if name == "wpe" or "position" in name]
    # OPT and BART have two unused rows. A table of any other size is not for text positions, but for images, say.
    return int(limit) if limit and any(limit <= count <= limit + 2 for count in rows) else None


def _may_occur(tokenizer: PreTrainedTokenizerBase, token: str, number: int) -> bool:
    """Whether a token may occur in text data; False for special tokens of other uses, such as Gemma 3's image token."""
    added = tokenizer.added_tokens_decoder.get(number)
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    return added is None or not added.special or token in named or token in str(tokenizer.chat_template)


def _tokenizer_file(name: str, revision: str | None) -> Path | None:
    directory = Path(name).expanduser()
    if directory.is_dir():
        file = directory / "tokenizer.json"
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(name, "tokenizer.json", revision=revision))
    except (OSError, ValueError):  # no such file or no network: nothing to compare with
        return None
