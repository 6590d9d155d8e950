"""A conversation in the terminal with a model and its adapters: answers appear as they are generated."""

import sys
from typing import Any

from transformers import PreTrainedTokenizerBase, TextStreamer
from typing_extensions import override

from paca_lightning.core.errors import PaCAError, did_you_mean
from paca_lightning.tasks.generation import answer
from paca_lightning.tools.model_with_adapters import BASE, ModelWithAdapters

COMMANDS = {
    "/adapter": "NAME: go on with this adapter",
    "/base": "go on with the base model",
    "/reset": "begin a new conversation",
    "/help": "show this",
    "/quit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}


class Chat:
    """A conversation, which the chat template renders anew for each answer.

    Args:
        models: The model and its adapters.
        current: Name of the adapter to begin with, or ``"base"``.
        system: Text of a system message, if any.
        **settings: Of the generation, as for ``answer``.
    """

    def __init__(self, models: ModelWithAdapters, current: str, system: str | None = None, **settings: Any) -> None:
        self.models, self.current, self._settings = models, current, settings
        self._begin = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._begin)

    def run(self) -> None:
        """Read lines of the standard input until it ends, or ``/quit``.

        Raises:
            PaCAError: If the input is not a terminal and has no line.
        """
        print(self._help())
        any_line = sys.stdin.isatty()
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                break
            except KeyboardInterrupt:
                print("\n/quit or Ctrl-D leaves.")
                continue
            any_line = True
            if line.strip() == "/quit":
                break
            if line.startswith("/"):
                print(self._command(*line.split()))
            elif line.strip():
                self._say(line.strip())
        if not any_line:
            raise PaCAError('There is no prompt. Give one: --prompts "What is your name?", or type some.')

    def _command(self, command: str, *names: str) -> str:
        """Do what a command says; returns what to print."""
        if command == "/reset":
            self.messages = list(self._begin)
            return "A new conversation."
        if command == "/base" or (command == "/adapter" and len(names) == 1):
            name = BASE if command == "/base" else names[0]
            known = [BASE, *self.models.names]
            if name not in known:
                return f"There is no adapter {name!r}.{did_you_mean(name, known)} {self._adapters()}"
            self.current = name
            return f"Now: {name}."
        if command == "/adapter":
            return self._adapters()
        if command == "/help":
            return self._help()
        return f"{command!r} is no command.{did_you_mean(command, COMMANDS)} A space before it sends it to the model."

    def _adapters(self) -> str:
        return f"Adapters: {', '.join(self.models.names) or 'none'}. Now: {self.current}."

    def _help(self) -> str:
        lines = [f"  {command} {purpose}" for command, purpose in COMMANDS.items()]
        return "\n".join(["Type a message.", *lines, self._adapters()])

    def _say(self, text: str) -> None:
        """Answer a message. What was said of an answer that was stopped stays in the conversation."""
        messages = [*self.messages, {"role": "user", "content": text}]
        with self.models.using(self.current) as tokenizer:
            printed = _Printed(tokenizer)
            try:
                answer(self.models.model, tokenizer, messages, streamer=printed, **self._settings)
            except KeyboardInterrupt:
                print(" [stopped]")
            except PaCAError as error:  # of the template, or as the conversation is too long
                print(f"{error} /reset begins a new conversation.\n")
                return
        print(flush=True)
        if said := printed.text.strip():
            self.messages = [*messages, {"role": "assistant", "content": said}]


class _Printed(TextStreamer):
    """Prints an answer as it comes, without special tokens, and keeps what was printed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    @override
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of the answer."""
        self.text += text
        super().on_finalized_text(text, stream_end)
