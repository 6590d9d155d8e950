"""Tokens as text in which some are marked, whole or shortened to fit one screen."""

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from paca_lightning.tasks.data.decode import decoded_runs

SAMPLE = 500
"""Characters of a shortened sample, so that all fits one screen of 100 columns and 40 lines."""

RUNS = 8
"""Runs of trained or untrained tokens in a shortened sample."""


def marked(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], trained: list[bool], full: bool = True) -> Text:
    """Decode tokens to text in which trained tokens stand in ⟦ ⟧, green on a terminal.

    Args:
        tokenizer: Decodes the tokens.
        input_ids: Tokens (T,).
        trained: Whether each is trained (T,).
        full: The whole text; otherwise the first runs, each with its middle left out if it is long.
    """
    text, runs = Text(), decoded_runs(tokenizer, input_ids, trained)
    shown = runs if full else runs[:RUNS]
    for part, on in shown:
        part = part if full else shortened(part, SAMPLE // len(shown))
        text.append(*((f"⟦{part}⟧", "bold green") if on else (part,)))
    return text if len(shown) == len(runs) else text.append(f" … and {len(runs) - len(shown)} more parts")


def shortened(text: str, limit: int) -> str:
    """A text on one line, with ↵ for line breaks, and without its middle if it is longer than the limit."""
    line = text.replace("\n", "↵")
    half = (limit - 3) // 2
    return line if len(line) <= limit else f"{line[:half]} … {line[-half:]}"
