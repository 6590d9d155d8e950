"""Evaluates a Hugging Face causal language model on MMLU. Prompts are built once and scored at each evaluation."""

from collections.abc import Sequence

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.evaluating import evaluating
from paca_lightning.tasks.mmlu.accuracy import Score, score_groups
from paca_lightning.tasks.mmlu.likelihood import cache_serves, deal, plan_batches, score
from paca_lightning.tasks.mmlu.metrics import MMLUAccuracy
from paca_lightning.tasks.mmlu.prompts import MAX_SHOTS, Method, Prompt, build_prompt
from paca_lightning.tasks.mmlu.questions import Question


class MMLUEvaluator:
    """Scores a model on questions by answer letter, by option likelihood, or both.

    ``letter`` lists the choices and takes the letter of the highest probability. ``likelihood`` does not list them and
    takes the choice of the highest log-likelihood per UTF-8 byte, at which small models do better.

    Args:
        questions: The questions to ask.
        examples: Questions that the solved examples are taken from, such as the dev split.
        tokenizer: The model's tokenizer.
        methods: How to answer.
        shots: Solved examples in each prompt: 0 to 5.
        batch_size: Questions scored at a time.
        max_length: Most tokens of a prompt with its answer. Longer prompts lose examples, the first ones first.
        confidence: Level of the confidence intervals.

    Raises:
        PaCAError: If a setting is out of its range, a subject has too few examples, or a question does not fit.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        examples: Sequence[Question],
        tokenizer: PreTrainedTokenizerBase,
        *,
        methods: Sequence[Method] = ("letter", "likelihood"),
        shots: int = MAX_SHOTS,
        batch_size: int = 8,
        max_length: int = 2048,
        confidence: float = 0.95,
    ) -> None:
        _check(methods, shots, batch_size, confidence)
        self.questions = list(questions)
        self.shots = shots
        self.batch_size = batch_size
        self.max_length = max_length
        self.confidence = confidence
        shown = _examples_by_subject(questions, examples, shots)
        self.prompts: dict[Method, list[Prompt]] = {
            method: [build_prompt(tokenizer, q, shown[q.subject], method, max_length) for q in questions]
            for method in methods
        }

    @property
    def shortened(self) -> dict[Method, int]:
        """Number of prompts of each method that lost examples."""
        return {method: sum(p.shots < self.shots for p in prompts) for method, prompts in self.prompts.items()}

    def evaluate(
        self, model: PreTrainedModel, rank: int = 0, world_size: int = 1, *, progress: bool = False
    ) -> dict[Method, list[Score]]:
        """Score the model with every method. All processes get the same result.

        Args:
            model: The model. The training mode of its modules is restored afterwards.
            rank: Rank of this process.
            world_size: Processes that share the questions.
            progress: Whether to show a progress bar.

        Returns:
            For each method the scores overall, by category and by subject.
        """
        with evaluating(model):
            return {method: self._evaluate(model, method, rank, world_size, progress) for method in self.prompts}

    def _evaluate(
        self, model: PreTrainedModel, method: Method, rank: int, world_size: int, progress: bool
    ) -> list[Score]:
        prompts = self.prompts[method]
        # Prompts of a subject share their examples, so they are batched together; others are batched by length alone.
        groups = [question.subject if self.shots else None for question in self.questions]
        batches = list(deal(plan_batches(prompts, groups, self.batch_size), rank, world_size))
        several_tokens = any(len(option) > 1 for prompt in prompts for option in prompt.options)
        cached = cache_serves(model.config, prompts)
        metric = MMLUAccuracy(self.questions).to(model.device)
        for batch in tqdm(batches, desc=f"MMLU by {method}", leave=False, disable=not progress):
            scores = score(model, batch.prompts, several_tokens=several_tokens, cached=cached)
            metric.update(batch.rows, scores.argmax(1))
        counts = metric.compute()
        return score_groups(counts["correct"].tolist(), counts["questions"].tolist(), self.confidence)


def _check(methods: Sequence[Method], shots: int, batch_size: int, confidence: float) -> None:
    if not methods or isinstance(methods, str) or not set(methods) <= {"letter", "likelihood"}:
        raise PaCAError(f"methods must be a list of 'letter', 'likelihood' or both, not {methods!r}.")
    if not 0 <= shots <= MAX_SHOTS:
        raise PaCAError(f"shots must be 0 to {MAX_SHOTS}, as MMLU has {MAX_SHOTS} examples a subject, not {shots}.")
    if batch_size < 1:
        raise PaCAError(f"batch_size must be at least 1, not {batch_size}.")
    if not 0 < confidence < 1:
        raise PaCAError(f"confidence must lie between 0 and 1, such as 0.95, not {confidence}.")


def _examples_by_subject(
    questions: Sequence[Question], examples: Sequence[Question], shots: int
) -> dict[str | None, list[Question]]:
    shown: dict[str | None, list[Question]] = {question.subject: [] for question in questions}
    for example in examples:
        if example.subject in shown and len(shown[example.subject]) < shots:
            shown[example.subject].append(example)
    for subject, found in shown.items():
        if len(found) < shots:
            raise PaCAError(f"The dev split has {len(found)} examples of {subject!r}: too few for shots={shots}.")
    return shown
