"""A callback that evaluates any LightningModule around a Hugging Face causal language model on MMLU."""

from collections.abc import Sequence
from typing import Any

import rich
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.callbacks.language_model import language_model
from paca_lightning.tasks.callbacks.run_directory import run_directory
from paca_lightning.tasks.data.tokenizer import load_tokenizer
from paca_lightning.tasks.mmlu.evaluator import MMLUEvaluator
from paca_lightning.tasks.mmlu.prompts import MAX_SHOTS, Method
from paca_lightning.tasks.mmlu.questions import sample
from paca_lightning.tasks.mmlu.report import Results, result_table, write_results
from paca_lightning.tasks.mmlu.sources import read_split
from paca_lightning.tasks.mmlu.subjects import check_subjects


class MMLUEvaluation(Callback):
    """Reports MMLU accuracy (Hendrycks et al., 2021, arXiv 2009.03300) after each validation and test.

    It has its own questions, so a model trained on any data can be evaluated. The module needs a Hugging Face causal
    language model in its attribute ``model``. Validation uses the validation split, testing the test split; the solved
    examples come from the dev split. The processes share the questions; the result does not depend on their number.

    Logged: ``mmlu/accuracy`` (micro, of the first method), and for each method ``mmlu/letter/micro``,
    ``mmlu/letter/macro``, ``mmlu/letter/STEM`` and so on. Printed as a table, and written as CSV and JSON into
    ``mmlu/`` in the run's directory, subject by subject.

    Args:
        source: A local directory of MMLU (original CSV folders, saved data sets, Parquet) or a hub id such as
            ``cais/mmlu``. Default: that of the ``MMLUDataModule``, if the trainer has one.
        tokenizer: Directory or hub id. Default: the tokenizer of the trainer's data module, or of the module.
        methods: ``letter`` lists the choices and compares the probabilities of their letters. ``likelihood`` does not
            list them, and compares the log-likelihood per UTF-8 byte of their texts.
        shots: Solved examples in each prompt, 0 to 5.
        subjects: Subjects to evaluate. Default: those of the ``MMLUDataModule``, or all 57.
        limit: Questions of each subject, drawn by ``seed``. Default: that of the ``MMLUDataModule``, or all.
        seed: Seed of the draw.
        batch_size: Questions scored at a time on each process.
        max_length: Most tokens of a prompt with its answer. Longer prompts lose examples, the first ones first.
        validation_split: Split that validation uses. Default: that of the ``MMLUDataModule``, or ``validation``.
        baseline: Also evaluate before the first training step, and show that result beside the later ones. A resumed
            run has none.
        confidence: Level of the confidence intervals.

    Raises:
        PaCAError: Before anything runs, if a setting, the source, a question or the model is wrong, or the run's
            directory cannot be written.
    """

    def __init__(
        self,
        source: str | None = None,
        tokenizer: str | None = None,
        methods: Sequence[Method] = ("letter", "likelihood"),
        shots: int = MAX_SHOTS,
        subjects: list[str] | None = None,
        limit: int | None = None,
        seed: int = 0,
        batch_size: int = 8,
        max_length: int = 2048,
        validation_split: str | None = None,
        baseline: bool = False,
        confidence: float = 0.95,
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.methods = methods
        self.shots = shots
        self.subjects = subjects
        self.limit = limit
        self.seed = seed
        self.batch_size = batch_size
        self.max_length = max_length
        self.validation_split = validation_split
        self.baseline = baseline
        self.confidence = confidence
        self.results: Results | None = None
        """Scores of the latest evaluation."""
        self._before: Results | None = None
        self._evaluators: dict[str, MMLUEvaluator] = {}

    def take_defaults(self, **settings: Any) -> None:
        """Set settings that were left at None; a data module calls it."""
        for name, value in settings.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            return
        self._directory = run_directory(trainer)
        split = self._split(stage)
        if split in self._evaluators:
            return
        if self.source is None:
            raise PaCAError("MMLUEvaluation has no source: set it to a directory of MMLU, or to a hub id (cais/mmlu).")
        subjects = check_subjects(self.subjects) if self.subjects is not None else None
        questions = sample(read_split(self.source, split, subjects), self.limit, self.seed)
        examples = read_split(self.source, "dev", subjects) if self.shots else []
        evaluator = MMLUEvaluator(
            questions,
            examples,
            self._load_tokenizer(trainer, pl_module),
            methods=self.methods,
            shots=self.shots,
            batch_size=self.batch_size,
            max_length=self.max_length,
            confidence=self.confidence,
        )
        for method, count in evaluator.shortened.items():
            if count:
                rank_zero_warn(
                    f"MMLU by {method}: {count} of {len(questions)} prompts have fewer than {self.shots} examples, "
                    f"so as to fit into max_length={self.max_length}."
                )
        self._evaluators[split] = evaluator

    # These raise before anything runs if the model cannot be used.

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._model(pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._model(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._model(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = None
        if self.baseline and trainer.global_step > 0:
            rank_zero_info("MMLU: a resumed run has no baseline before training.")
        elif self.baseline:
            self._before = self._evaluate(trainer, pl_module, "before")
            for logger in trainer.loggers:
                logger.log_metrics({f"mmlu/before/{name}": value for name, value in _metrics(self._before).items()}, 0)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._evaluate_and_log(trainer, pl_module, "validate")

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate_and_log(trainer, pl_module, "test")

    def _evaluate_and_log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.results = self._evaluate(trainer, pl_module, stage)
        for name, value in _metrics(self.results).items():
            # Equal on all processes, and the maximum keeps it exactly. Without a reduction, Lightning warns.
            pl_module.log(f"mmlu/{name}", value, sync_dist=True, reduce_fx="max")

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> Results:
        split = self._split(stage)
        evaluator = self._evaluators[split]
        ranks = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        bar = trainer.progress_bar_callback
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            results = evaluator.evaluate(
                self._model(pl_module),
                ranks["rank"],
                ranks["num_replicas"],
                progress=trainer.is_global_zero and getattr(bar, "is_enabled", False),
            )
        if trainer.is_global_zero:
            title = f"MMLU: {split} split, {self.shots}-shot, step {trainer.global_step}"
            # The 57 subjects would fill the screen at every validation; the files have them.
            fitting = trainer.state.fn == TrainerFn.FITTING
            rich.print(result_table(title, results, self._before, subjects=not fitting))
            name = f"{stage}-step={trainer.global_step:06d}"
            write_results(self._directory / "mmlu", name, results, self._description(split, trainer.global_step))
        return results

    def _description(self, split: str, step: int) -> dict[str, Any]:
        evaluator = self._evaluators[split]
        names = ("source", "shots", "limit", "seed", "max_length", "confidence")
        settings = {name: getattr(self, name) for name in names}
        return {"split": split, "step": step, **settings, "prompts_with_fewer_examples": evaluator.shortened}

    def _split(self, stage: str) -> str:
        return "test" if stage == "test" else self.validation_split or "validation"

    def _model(self, pl_module: LightningModule) -> PreTrainedModel:
        model = language_model(pl_module, "MMLUEvaluation")
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", self.max_length)
        if positions < self.max_length:
            raise PaCAError(
                f"The model has {positions} positions, fewer than max_length={self.max_length} of MMLUEvaluation. Set "
                f"max_length to {positions} or less."
            )
        return model

    def _load_tokenizer(self, trainer: Trainer, pl_module: LightningModule) -> PreTrainedTokenizerBase:
        owners = (self, getattr(trainer, "datamodule", None), pl_module)
        found = next((t for t in (getattr(owner, "tokenizer", None) for owner in owners) if t is not None), None)
        if found is None:
            raise PaCAError("MMLUEvaluation has no tokenizer: set it to the model's directory, or its hub id.")
        tokens = getattr(pl_module, "new_tokens", ())
        return load_tokenizer(found, new_tokens=tokens) if isinstance(found, str) else found


def _metrics(results: Results) -> dict[str, float]:
    """Accuracies overall and by category, by the names they are logged under."""
    named = {"accuracy": next(iter(results.values()))[0].accuracy}
    for method, scores in results.items():
        named |= {f"{method}/{s.name.replace(' ', '_')}": s.accuracy for s in scores if s.level != "subject"}
    return named
