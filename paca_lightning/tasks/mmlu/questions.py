"""Multiple-choice questions: checked field by field, and sampled by seed."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.mmlu.subjects import check_subject

LETTERS = "ABCD"


@dataclass(frozen=True, slots=True)
class Question:
    """One question with four choices.

    Attributes:
        where: File and row, for messages.
        subject: One of the 57 subjects, or None in training data without subjects.
        question: The question, stripped.
        choices: The four choices, stripped.
        answer: Index of the right one: 0 to 3.
    """

    where: str
    subject: str | None
    question: str
    choices: tuple[str, str, str, str]
    answer: int


def check_question(where: str, fields: Mapping[str, Any]) -> Question:
    """Build a question from the fields ``question``, ``choices``, ``answer`` (0-3 or A-D) and ``subject``.

    Args:
        where: File and row, for messages.
        fields: The fields of the row.

    Raises:
        PaCAError: Naming the row and the field that is missing or wrong.
    """
    for name in ("question", "choices", "answer"):
        if fields.get(name) is None:
            raise PaCAError(f"{where}: the field {name!r} is missing.")
    question, choices, answer = fields["question"], fields["choices"], fields["answer"]
    if not isinstance(question, str) or not question.strip():
        raise PaCAError(f"{where}: the field 'question' must be a text, not {question!r}.")
    if isinstance(choices, str) or not isinstance(choices, Sequence) or len(choices) != len(LETTERS):
        raise PaCAError(f"{where}: the field 'choices' must be a list of four texts, not {choices!r}.")
    for letter, choice in zip(LETTERS, choices, strict=True):
        if not isinstance(choice, str) or not choice.strip():
            raise PaCAError(f"{where}: the field 'choices' must be four texts, but {letter} is {choice!r}.")
    if (subject := fields.get("subject") or None) is not None:
        check_subject(subject, where)
    a, b, c, d = (choice.strip() for choice in choices)
    return Question(where, subject, question.strip(), (a, b, c, d), _answer(where, answer))


def _answer(where: str, answer: object) -> int:
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        return LETTERS.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(LETTERS):
        return answer
    if isinstance(answer, str) and answer.strip().isdigit():
        raise PaCAError(
            f"{where}: the field 'answer' is the text {answer!r}, which may count from 0 or from 1. In CSV files and "
            "texts, write the letter (A, B, C or D); the numbers 0 to 3 are taken from JSON and Parquet."
        )
    raise PaCAError(f"{where}: the field 'answer' must be 0, 1, 2 or 3 (or A, B, C or D), not {answer!r}.")


def sample(questions: Sequence[Question], limit: int | None, seed: int) -> list[Question]:
    """Up to ``limit`` questions of each subject, drawn by seed, in their order; all for ``None``.

    A subject's draw depends on the seed and its name alone, not on the other subjects.

    Raises:
        PaCAError: If the limit is not positive.
    """
    if limit is None:
        return list(questions)
    if limit < 1:
        raise PaCAError(f"limit is the number of questions of each subject: at least 1, not {limit}.")
    by_subject: dict[str | None, list[Question]] = defaultdict(list)
    for question in questions:
        by_subject[question.subject].append(question)
    drawn = []
    for subject, group in by_subject.items():
        rows = random.Random(f"{seed}/{subject}").sample(range(len(group)), min(limit, len(group)))  # noqa: S311
        drawn += [group[row] for row in sorted(rows)]
    return drawn
