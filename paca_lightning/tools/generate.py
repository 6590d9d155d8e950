"""Answer prompts with a model and its adapter."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paca_lightning.adapters.adapter import load_adapter
from paca_lightning.adapters.history import tokenizer_directory
from paca_lightning.adapters.saved import is_checkpoint, saved_config
from paca_lightning.conversion.revert import merge
from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.tokenizer import load_tokenizer
from paca_lightning.tasks.generation import answer
from paca_lightning.tasks.pretrained import build_causal_lm

log = logging.getLogger(__name__)


def generate(
    model: str,
    prompts: str | list[str] | None = None,
    adapter: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Print a model's answer to each prompt, in the chat template of training.

    A tokenizer without a template gets ChatML, as in training.

    Args:
        model: Hugging Face directory or hub id of the base model.
        prompts: One prompt, "What is your name?", or a list, '["What is your name?", "Who made you?"]'. Each begins a
            conversation. Default: type them in, one a line; an empty line ends.
        adapter: Adapter directory, such as the one that AdapterCheckpoint wrote, or a Lightning checkpoint of a run: a
            .ckpt file, or the directory of a sharded one. If an adapter or its history has a tokenizer, that
            one is used, as it has the chat template of training. Default: the base model alone.
        system: Text of a system message before each prompt. Default: the chat template's own, if it has one.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time. Above 0, tokens are sampled: at 1 from the model's own
            distribution, below 1 from a sharper one.
        top_p: Sample from the likeliest tokens that together have this probability; above 0 and at most 1.
        seed: For sampling: the same seed gives the same answers. Default: other answers each time.
        device: cpu, cuda, ...; auto is the accelerator if there is one.
        dtype: Of the weights: auto (as saved), float32, bfloat16 or float16.
        revision: Branch, tag or commit of the model on the hub.
        trust_remote_code: Run code that comes with the model.

    Raises:
        PaCAError: If the model, its tokenizer, the adapter or the device cannot be used, a number is out of range,
            there is no prompt, or the chat template refuses the messages.
    """
    _check_numbers(max_new_tokens, temperature, top_p)
    asked = [prompts] if isinstance(prompts, str) else prompts
    if asked is not None and not any(prompt.strip() for prompt in asked):
        raise PaCAError('There is no prompt. Give one: --prompts "What is your name?".')
    found = _find_device(device)
    built, tokenizer = load_with_adapter(model, adapter, dtype, revision=revision, trust_remote_code=trust_remote_code)
    merge(built)
    built.to(found)  # type: ignore[arg-type]
    if seed is not None:
        torch.manual_seed(seed)
    before = [] if system is None else [{"role": "system", "content": system}]
    sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    settings: dict[str, Any] = sampled if temperature > 0 else {"do_sample": False}
    for prompt in _typed_prompts() if asked is None else asked:
        messages = [*before, {"role": "user", "content": prompt}]
        if asked is not None:
            print(f"> {prompt}")
        print(f"{answer(built, tokenizer, messages, max_new_tokens=max_new_tokens, **settings)}\n", flush=True)


def _check_numbers(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise a PaCAError if a number is out of range."""
    if max_new_tokens < 1:
        raise PaCAError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    if not 0 <= temperature < float("inf"):
        raise PaCAError(f"temperature must be 0 (the likeliest token each time) or above, not {temperature}.")
    if not 0 < top_p <= 1:
        raise PaCAError(f"top_p must be above 0 and at most 1, not {top_p}.")
    if temperature == 0 and top_p < 1:
        raise PaCAError(f"top_p={top_p} needs a temperature above 0: at 0 nothing is sampled.")


def _typed_prompts() -> Iterator[str]:
    """Lines of the standard input, until an empty one."""
    prompt = None
    with suppress(EOFError):
        while prompt := input("> ").strip():
            yield prompt
    if prompt is None:
        raise PaCAError('There is no prompt. Give one: --prompts "What is your name?", or type some.')


def _find_device(device: str) -> torch.device:
    """The device to use, if this machine has it."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        found = (accelerator or torch.device("cpu")) if device == "auto" else torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        raise PaCAError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return found


def load_with_adapter(
    model: str,
    adapter: str | None,
    dtype: str = "auto",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model with an adapter, in eval mode, and the tokenizer.

    Args:
        model: Hugging Face directory or hub id.
        adapter: Adapter directory or checkpoint. If it or its history has a tokenizer, that one is loaded, as it has
            the chat template of training. None: the base model alone.
        dtype: Of the weights: auto (as saved), float32, bfloat16 or float16.
        revision: Branch, tag or commit of the model and its tokenizer on the hub.
        trust_remote_code: Whether to run code that comes with the model or the tokenizer.

    Raises:
        PaCAError: If the model, the tokenizer or the adapter cannot be used.
    """
    if adapter is not None:
        saved_config(adapter)  # before a large model is loaded
    built = build_causal_lm(model, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    if adapter is not None and (own := tokenizer_directory(adapter)) is not None:
        tokenizer = load_tokenizer(str(own), trust_remote_code=trust_remote_code)
    else:
        tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    if adapter is not None:
        load_adapter(built, adapter)
        if is_checkpoint(Path(adapter)):
            log.warning(
                "%s: a checkpoint has no tokenizer, so that of %s is used, with its chat template. If the run had "
                "another one, take the adapter directory that AdapterCheckpoint wrote.",
                adapter,
                model,
            )
    return built.eval(), tokenizer
