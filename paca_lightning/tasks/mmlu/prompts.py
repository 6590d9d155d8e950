"""Few-shot prompts with their four continuations, as tokens.

Letter prompts have the wording of the benchmark's authors (arXiv 2009.03300). Likelihood prompts do not list the
choices, as the text of a choice is scored, not its letter.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.mmlu.questions import LETTERS, Question

Method = Literal["letter", "likelihood"]

MAX_SHOTS = 5  # the dev split has five questions of each subject


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question ready to be scored.

    Attributes:
        tokens: The prompt, with a beginning-of-sequence token if the tokenizer adds one.
        options: Tokens of the four continuations.
        lengths: Divisor of each continuation's log-likelihood: 1 for letters, UTF-8 bytes for texts.
        shots: Number of examples in the prompt.
    """

    tokens: "array[int]"  # C ints: 4 bytes a token, where a list takes up to 36
    options: "tuple[array[int], ...]"
    lengths: tuple[int, ...]
    shots: int


def _letter_stem(question: Question) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.question}{choices}\nAnswer:"


def _likelihood_stem(question: Question) -> str:
    return f"Question: {question.question}\nAnswer:"


_STEMS: dict[Method, Callable[[Question], str]] = {"letter": _letter_stem, "likelihood": _likelihood_stem}
_KINDS: dict[Method, str] = {"letter": "multiple choice questions", "likelihood": "questions"}


def _header(method: Method, subject: str | None) -> str:
    about = "" if subject is None else f" about {subject.replace('_', ' ')}"
    return f"The following are {_KINDS[method]} (with answers){about}.\n\n"


def _answers(method: Method, question: Question) -> Sequence[str]:
    return LETTERS if method == "letter" else question.choices


def prompt_text(question: Question, examples: Sequence[Question], method: Method) -> str:
    """The prompt: a header naming the subject, the solved examples, and the question up to ``Answer:``."""
    stem = _STEMS[method]
    solved = (f"{stem(shown)} {_answers(method, shown)[shown.answer]}\n\n" for shown in examples)
    return _header(method, question.subject) + "".join(solved) + stem(question)


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer adds one to a text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Start tokens and tokens of each text, without an end-of-sequence token."""
    start = start_tokens(tokenizer)
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [start + tokens for tokens in encoded]


def continuations(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text after ``Answer:`` and a space.

    The text is tokenized in its place, as SentencePiece tokenizers add a space to the front of a text.

    Raises:
        PaCAError: If the tokenizer merges the colon with what follows, so that a prompt cannot end there.
    """
    stem: list[int] = tokenizer("Answer:", add_special_tokens=False)["input_ids"]
    encoded: list[list[int]] = tokenizer([f"Answer: {text}" for text in texts], add_special_tokens=False)["input_ids"]
    for text, tokens in zip(texts, encoded, strict=True):
        if tokens[: len(stem)] != stem or len(tokens) == len(stem):
            raise PaCAError(f"The tokenizer does not split 'Answer: {text}' after the colon, so MMLU cannot be scored.")
    return [tokens[len(stem) :] for tokens in encoded]


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    examples: Sequence[Question],
    method: Method,
    max_length: int,
) -> Prompt:
    """Tokenize a question with as many examples as fit; the first ones are dropped first.

    Args:
        tokenizer: The model's tokenizer.
        question: The question to score.
        examples: Solved questions to show before it, usually of the same subject.
        method: ``letter`` (choices are listed) or ``likelihood`` (they are not).
        max_length: Most tokens of the prompt and a continuation together.

    Raises:
        PaCAError: If the question does not fit even without examples.
    """
    answers = _answers(method, question)
    options = tuple(array("i", tokens) for tokens in continuations(tokenizer, answers))
    room = max_length - max(map(len, options))
    for first in range(len(examples) + 1):
        (tokens,) = encode(tokenizer, [prompt_text(question, examples[first:], method)])
        if len(tokens) <= room:
            lengths = tuple(1 if method == "letter" else len(answer.encode()) for answer in answers)
            return Prompt(array("i", tokens), options, lengths, len(examples) - first)
    raise PaCAError(
        f"{question.where}: the question alone has {len(tokens)} tokens, which with its answer does not fit into "
        f"max_length={max_length}. Raise max_length, or leave out the subject {question.subject!r}."
    )
