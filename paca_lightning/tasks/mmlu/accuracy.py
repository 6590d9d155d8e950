"""Accuracy by subject, category and overall, with confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, fmean
from typing import Literal

from paca_lightning.tasks.mmlu.subjects import CATEGORIES, CATEGORY_OF, SUBJECTS

Level = Literal["overall", "category", "subject"]


@dataclass(frozen=True)
class Score:
    """Accuracy on one group of questions.

    Attributes:
        level: Whether the group is all questions, a category or a subject.
        name: Name of the group; ``micro`` or ``macro`` for all questions.
        correct: Questions answered rightly.
        questions: Questions asked.
        accuracy: Share answered rightly; for ``macro``, the mean of the subjects' accuracies.
        low: Lower end of its confidence interval.
        high: Upper end.
    """

    level: Level
    name: str
    correct: int
    questions: int
    accuracy: float
    low: float
    high: float


def wilson_interval(correct: float, questions: float, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion (J. Am. Stat. Assoc. 22, 1927), within 0 and 1 also for few questions."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = correct / questions, z * z / questions
    centre = (share + weight / 2) / (1 + weight)
    half = z * sqrt(share * (1 - share) / questions + weight / questions / 4) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)


def score_groups(correct: Sequence[int], questions: Sequence[int], confidence: float = 0.95) -> list[Score]:
    """Scores overall (micro, macro), of the four categories, and of the subjects that were asked.

    Args:
        correct: Right answers of each of the 57 subjects.
        questions: Questions of each.
        confidence: Level of the intervals.
    """
    counts = {name: (c, n) for name, c, n in zip(SUBJECTS, correct, questions, strict=True) if n}
    scores = [_pooled("overall", "micro", list(counts.values()), confidence), _macro(list(counts.values()), confidence)]
    for category in CATEGORIES:
        if members := [count for name, count in counts.items() if CATEGORY_OF[name] == category]:
            scores.append(_pooled("category", category, members, confidence))
    return scores + [_pooled("subject", name, [count], confidence) for name, count in counts.items()]


def _pooled(level: Level, name: str, counts: Sequence[tuple[int, int]], confidence: float) -> Score:
    correct, questions = (sum(column) for column in zip(*counts, strict=True))
    return Score(level, name, correct, questions, correct / questions, *wilson_interval(correct, questions, confidence))


def _macro(counts: Sequence[tuple[int, int]], confidence: float) -> Score:
    """Mean of the subjects' accuracies, with a normal interval of their summed variances.

    Each subject gets z^2 more questions, half of them right (Agresti and Coull, Am. Stat. 52, 1998), as a subject with
    all answers right or wrong would have no variance.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    accuracy = fmean(c / n for c, n in counts)
    smoothed = [((c + z * z / 2) / (n + z * z), n + z * z) for c, n in counts]
    half = z * sqrt(sum(p * (1 - p) / n for p, n in smoothed)) / len(counts)
    correct, questions = (sum(column) for column in zip(*counts, strict=True))
    return Score("overall", "macro", correct, questions, accuracy, max(0.0, accuracy - half), min(1.0, accuracy + half))
