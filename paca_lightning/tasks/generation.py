"""Generates a chat model's next message with the chat template it was trained on."""

from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.bounded_template import render_chat


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    streamer: TextStreamer | None = None,
    **settings: Any,
) -> str:
    """The next message of a conversation, without special tokens.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer, with a chat template.
        messages: The conversation so far: ``role`` and ``content`` of each turn.
        streamer: Gets the tokens as they are generated.
        **settings: Settings of ``transformers.GenerationConfig``, such as ``max_new_tokens`` and ``do_sample``.

    Raises:
        PaCAError: If the chat template refuses the messages, or they leave no place for an answer.
    """
    try:
        inputs: Any = render_chat(
            tokenizer, messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # a template is a program and may raise anything
        raise PaCAError(f"The chat template refuses these messages: {error}") from error
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    length, limit = inputs["input_ids"].shape[1], getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length >= limit:
        raise PaCAError(f"The messages have {length} tokens, and the model reads {limit}, its answer included.")
    # Generation stops at the tokenizer's end of sequence, and at those in the model's generation config.
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})
    config = GenerationConfig(
        **settings,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if tokenizer.pad_token_id is None and ends else tokenizer.pad_token_id,
    )
    output = model.generate(**inputs, generation_config=config, streamer=streamer)  # type: ignore[operator]
    new = output[0, length:]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()
