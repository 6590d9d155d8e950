"""A chat model's answers to a few questions, before and after training."""

import json

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.evaluating import evaluating
from paca_lightning.core.files import replacing
from paca_lightning.tasks.callbacks.language_model import language_model
from paca_lightning.tasks.callbacks.run_directory import run_directory
from paca_lightning.tasks.data.tokenizer import load_tokenizer
from paca_lightning.tasks.generation import answer

FILE_NAME = "answers.json"


class SampleAnswers(Callback):
    """Asks the model in ``pl_module.model`` some questions before and after training, and keeps the answers.

    Each question is a conversation of its own in the tokenizer's chat template, and decoding is greedy. The answers
    are printed as a table and written to ``answers.json`` in the run's directory. All processes generate, as a sharded
    model needs; the first one prints and writes. A run resumed from a checkpoint asks after training only.

    Args:
        prompts: The questions.
        max_new_tokens: Longest answer, in tokens.
        tokenizer: Directory or hub id. Default: the data module's ``tokenizer``.

    Raises:
        PaCAError: If there is no question, no tokenizer, no chat template or no Hugging Face model, or the run's
            directory cannot be written.
    """

    def __init__(self, prompts: list[str], max_new_tokens: int = 64, tokenizer: str | None = None) -> None:
        if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise PaCAError(f"SampleAnswers needs a list of questions as `prompts`, not {prompts!r}.")
        if max_new_tokens < 1:
            raise PaCAError(f"SampleAnswers: max_new_tokens must be at least 1, not {max_new_tokens}.")
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.tokenizer = tokenizer
        self.answers: dict[str, list[str]] = {}
        self._tokenizer: PreTrainedTokenizerBase

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the tokenizer, and check that the answers can be written."""
        if stage == "fit":
            self._tokenizer = self._find_tokenizer(trainer)
            self._directory = run_directory(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a model to ask."""
        language_model(pl_module, "SampleAnswers")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask before the first step of a new run."""
        self.answers = {}
        if trainer.global_step == 0:
            self._ask_and_show(trainer, pl_module, "before")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask after the last step, and write all answers."""
        self._ask_and_show(trainer, pl_module, "after")
        self._write()

    def _find_tokenizer(self, trainer: Trainer) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase | None
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer, new_tokens=getattr(trainer.lightning_module, "new_tokens", ()))
        else:
            tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
            if tokenizer is None:
                raise PaCAError(
                    "SampleAnswers found no tokenizer: the data module has none as `tokenizer`. Name one in the "
                    "callback's `tokenizer`: a directory or a hub id."
                )
        if tokenizer.chat_template is None:
            raise PaCAError("SampleAnswers asks through a chat template, and the tokenizer has none. Give it one.")
        return tokenizer

    def _ask_and_show(self, trainer: Trainer, pl_module: LightningModule, when: str) -> None:
        self.answers[when] = self._ask(trainer, pl_module)
        self._show(f"Answers {' and '.join(self.answers)} training")

    def _ask(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """The model's answers; each module's training mode is restored afterwards."""
        model = language_model(pl_module, "SampleAnswers")
        precision = trainer.precision_plugin.forward_context()
        eagerly = torch.compiler.set_stance("force_eager")  # else recompiled for each length of the cache
        # Without dropout, and with a key-value cache also where activations are checkpointed.
        with evaluating(model), torch.no_grad(), precision, eagerly:
            return [self._answer(model, prompt) for prompt in self.prompts]

    def _answer(self, model: PreTrainedModel, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return answer(model, self._tokenizer, messages, max_new_tokens=self.max_new_tokens, do_sample=False)

    @rank_zero_only
    def _show(self, title: str) -> None:
        table = Table(title=title, show_lines=True)
        for column in ("question", *self.answers):
            table.add_column(column)
        for row in zip(self.prompts, *self.answers.values(), strict=True):
            table.add_row(*map(Text, row))  # not as markup: answers may contain brackets
        Console().print(table)

    @rank_zero_only
    def _write(self) -> None:
        columns = ("prompt", *self.answers)
        rows = [dict(zip(columns, row, strict=True)) for row in zip(self.prompts, *self.answers.values(), strict=True)]
        path = self._directory / FILE_NAME
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        rank_zero_info(f"Answers: {path}")
