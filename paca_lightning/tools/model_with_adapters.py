"""A base model with adapters for the commands that answer and measure: one at a time computes, or the base model."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paca_lightning.adapters.adapter import load_adapter
from paca_lightning.adapters.head import Head
from paca_lightning.adapters.history import tokenizer_directory
from paca_lightning.adapters.saved import is_checkpoint, saved_needs
from paca_lightning.conversion.named_adapters import set_adapter
from paca_lightning.conversion.revert import disable_paca
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import NewTokens
from paca_lightning.tasks.data.new_tokens import extend_tokenizer
from paca_lightning.tasks.data.tokenizer import load_tokenizer, pad_token_id, plain_tokenizer
from paca_lightning.tasks.new_heads import HeadTask, build_with_head
from paca_lightning.tasks.new_tokens import check_same_numbers
from paca_lightning.tasks.pretrained import build_causal_lm
from paca_lightning.tools.quiet import quiet

log = logging.getLogger(__name__)

BASE = "base"
"""What the base model is called beside its adapters."""


class ModelWithAdapters:
    """A base model with adapters.

    Args:
        model: Hugging Face directory or hub id of the base model.
        adapters: Adapter directories or checkpoints, also as NAME=DIRECTORY.
        dtype: Of the weights: auto (as saved), float32, bfloat16 or float16.
        revision: Branch, tag or commit of the model and its tokenizer on the hub.
        trust_remote_code: Whether to run code that comes with the model or the tokenizer.
        with_head: Whether an adapter may be of a model with a head over labels, which does not answer.

    Attributes:
        model: In eval mode.
        sources: Directories and checkpoints of the adapters, by name.
        names: Of the adapters, in the order in which they were given.

    Raises:
        PaCAError: If the model, its tokenizer or an adapter cannot be used.
    """

    def __init__(
        self,
        model: str,
        adapters: Sequence[str],
        dtype: str = "auto",
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        with_head: bool = False,
    ) -> None:
        self.sources = sources = named_sources(adapters)
        self._head: Head | None = None
        self._new_tokens: dict[str, NewTokens] = {}
        for name, source in sources.items():  # before a large model is loaded
            self._head, new_tokens = saved_needs(source)
            if new_tokens is not None:
                self._new_tokens[name] = new_tokens
            if self._head is not None and not with_head:
                raise PaCAError(
                    f"{source}: the adapter of a model with a head over {len(self._head.labels)} labels, which writes "
                    "no text. Write the whole model with `paca-lightning export`, and use transformers.pipeline."
                )
        self.names = list(sources)
        self._base, self._revision, self._trusted = model, revision, trust_remote_code
        self._own = {name: tokenizer_directory(source) for name, source in sources.items()}
        self._tokenizers: dict[tuple[Path | None, NewTokens | None], PreTrainedTokenizerBase] = {}
        loading = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
        if self._head is None:
            self.model: PreTrainedModel = build_causal_lm(model, **loading)
        else:
            self.model = self._with_head(self._head, loading)
        for name in self.names or [BASE]:
            self.tokenizer(name)
        for name, source in sources.items():
            load_adapter(self.model, source, name=name if len(sources) > 1 else None)  # one may have an NF4 base
            if is_checkpoint(Path(source)):
                log.warning(
                    "%s: a checkpoint has no tokenizer, so that of %s is used, with its chat template. If the run had "
                    "another one, take the adapter directory that AdapterCheckpoint wrote.",
                    source,
                    model,
                )
        self.model.eval()

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """The tokenizer of an adapter, with the chat template of its training, or that of the base model.

        Raises:
            PaCAError: If it cannot be loaded, or numbers the adapter's new tokens otherwise.
        """
        directory, new = self._own.get(name), self._new_tokens.get(name)
        if (directory, new) not in self._tokenizers:
            source, revision = (self._base, self._revision) if directory is None else (str(directory), None)
            load = load_tokenizer if self._head is None else plain_tokenizer
            loaded = load(source, revision=revision, trust_remote_code=self._trusted)
            if new is not None:
                if directory is None:
                    extend_tokenizer(loaded, new.tokens)
                check_same_numbers(loaded, new)
            self._tokenizers[directory, new] = loaded
        return self._tokenizers[directory, new]

    def _with_head(self, head: Head, settings: dict[str, Any]) -> PreTrainedModel:
        """The base model with a head like that of the adapter's, which the adapter fills."""
        tasks: dict[str | None, HeadTask] = {"multi_label_classification": "multi_label", "regression": "regression"}
        task = "tokens" if head.kind == "ForTokenClassification" else tasks.get(head.problem_type, "sequence")
        pad = pad_token_id(self.tokenizer(self.names[0]))
        with quiet("transformers.modeling_utils", logging.ERROR):  # that the head is random: the adapter fills it
            return build_with_head(self._base, task=task, labels=list(head.labels), pad_token_id=pad, **settings)

    @contextmanager
    def using(self, name: str) -> Iterator[PreTrainedTokenizerBase]:
        """Inside this context the model computes with an adapter, or is the base model; gives the tokenizer to use."""
        tokenizer = self.tokenizer(name)
        if len(self.names) > 1:
            set_adapter(self.model, None if name == BASE else name)
        with disable_paca(self.model) if name == BASE and len(self.names) == 1 else nullcontext():
            yield tokenizer


def named_sources(adapters: Sequence[str]) -> dict[str, str]:
    """Adapters by name: the one given before ``=``, or as much of the end of the path as tells them apart.

    Raises:
        PaCAError: If two have the same name, or one is called as the base model.
    """
    named = [("", each) if "=" not in each or Path(each).exists() else each.split("=", 1) for each in adapters]
    paths = [Path(source).absolute().parts for _, source in named]
    found: dict[str, str] = {}
    for (name, source), parts in zip(named, paths, strict=True):
        others = [other for other in paths if other is not parts]
        lengths = range(1, len(parts) + 1)
        unique = next((n for n in lengths if all(other[-n:] != parts[-n:] for other in others)), len(parts))
        name = name or "/".join(parts[-unique:])
        if name in found or name == BASE:
            raise PaCAError(
                f"Two models would be called {name!r}: {source!r} and {found.get(name, 'the base model')!r}. Name one: "
                f"--adapter NAME={source}."
            )
        found[name] = source
    return found
