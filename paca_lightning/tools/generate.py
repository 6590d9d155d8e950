"""Answer prompts with a model and its adapters."""

from typing import Any

import rich
import torch
from rich.markup import escape
from rich.table import Table

from paca_lightning.conversion.revert import merge
from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.generation import answer
from paca_lightning.tools.chat import Chat
from paca_lightning.tools.model_with_adapters import BASE, ModelWithAdapters


def generate(
    model: str,
    prompts: str | list[str] | None = None,
    adapter: str | list[str] | None = None,
    base: bool = False,
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
    """Print a model's answer to each prompt, in the chat template of training; without prompts, chat in the terminal.

    Several models answer side by side. A chat keeps the conversation and switches between adapters by a command. A
    tokenizer without a template gets ChatML, as in training.

    Args:
        model: Hugging Face directory or hub id of the base model.
        prompts: One prompt, "What is your name?", or a list, '["What is your name?", "Who made you?"]'. Each begins a
            conversation. Default: a chat in the terminal.
        adapter: Adapter directory, such as the one that AdapterCheckpoint wrote, or a Lightning checkpoint of a run: a
            .ckpt file, or the directory of a sharded one. If an adapter or its history has a tokenizer, that
            one is used, as it has the chat template of training. Several, --adapter A B, answer side by side; each
            may have a name, --adapter sql=DIRECTORY. Default: the base model alone.
        base: Show the answers of the base model, too; a chat begins with it.
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
    adapters = [adapter] if isinstance(adapter, str) else adapter or []
    found = find_device(device)
    models = ModelWithAdapters(model, adapters, dtype, revision=revision, trust_remote_code=trust_remote_code)
    names = [BASE, *models.names] if base or not models.names else models.names
    if asked is not None and len(names) == 1:
        merge(models.model)
    models.model.to(found)  # type: ignore[arg-type]
    if seed is not None:
        torch.manual_seed(seed)
    sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    settings: dict[str, Any] = sampled if temperature > 0 else {"do_sample": False}
    settings["max_new_tokens"] = max_new_tokens
    if asked is None:
        Chat(models, names[0], system, **settings).run()
        return
    before = [] if system is None else [{"role": "system", "content": system}]
    for prompt in asked:
        print(f"> {prompt}")
        answers = {}
        for name in names:
            with models.using(name) as tokenizer:
                messages = [*before, {"role": "user", "content": prompt}]
                answers[name] = answer(models.model, tokenizer, messages, **settings)
        _show(answers)


def _show(answers: dict[str, str]) -> None:
    """Print an answer, or those of several models side by side."""
    if len(answers) == 1:
        print(f"{next(iter(answers.values()))}\n", flush=True)
        return
    table = Table(*map(escape, answers), expand=True)
    table.add_row(*map(escape, answers.values()))
    rich.print(table)


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


def find_device(device: str) -> torch.device:
    """The device to use.

    Raises:
        PaCAError: If this machine does not have it.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        found = (accelerator or torch.device("cpu")) if device == "auto" else torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        raise PaCAError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return found
