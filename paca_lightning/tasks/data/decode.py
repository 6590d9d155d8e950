"""Decodes tokens back to text, with the trained ones marked."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase


def decoded_runs(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], trained: Sequence[bool]
) -> list[tuple[str, bool]]:
    """The text of each run of tokens that are trained or not, and whether they are.

    Args:
        tokenizer: Decodes the tokens.
        input_ids: Tokens (T,); at least one.
        trained: Whether each is trained (T,).
    """
    bounds = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(input_ids)]
    # Decoded from the start each time: some tokenizers drop the first token's leading space.
    texts = [str(tokenizer.decode(list(input_ids[:bound]), clean_up_tokenization_spaces=False)) for bound in bounds]
    return [(texts[i + 1][len(texts[i]) :], bool(trained[start])) for i, start in enumerate(bounds[:-1])]


def marked_text(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], trained: Sequence[bool]) -> str:
    """The text of tokens, with each run of trained ones in ⟦ ⟧."""
    return "".join(f"⟦{text}⟧" if on else text for text, on in decoded_runs(tokenizer, input_ids, trained))
