"""Rows that are tokens already: `input_ids`, and optionally `labels` and `attention_mask`."""

import numpy as np

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.batch import IGNORE_INDEX
from paca_lightning.tasks.data.chat import Encoded
from paca_lightning.tasks.data.fields import Fields, Row, kind


def pretokenized(row: Row, vocabulary: int) -> tuple[Encoded, list[str]]:
    """The tokens of a row, and the names of fields that nothing uses.

    Without `labels`, every token is trained but the first. Padding (`attention_mask` 0) is taken away.

    Args:
        row: The row.
        vocabulary: Number of tokens that the tokenizer knows.

    Raises:
        PaCAError: A field is no list of whole numbers, its length is another, a token is not in the vocabulary, or
            labels are not those of the tokens at their places.
    """
    fields = Fields(row)
    ids = _numbers(fields, "input_ids")
    if ids is None:
        raise PaCAError("the field 'input_ids' is missing or empty")
    labels, mask = _numbers(fields, "labels", len(ids)), _numbers(fields, "attention_mask", len(ids))
    for name in ("token_type_ids", "special_tokens_mask"):  # what tokenizers return and no causal model needs
        fields.take(name)
    unknown = np.flatnonzero((ids < 0) | (ids >= vocabulary))
    if len(unknown):
        raise PaCAError(
            f"the field 'input_ids[{unknown[0]}]' is {ids[unknown[0]]}, but the tokenizer knows {vocabulary:,} tokens, "
            "from 0 on. Were the rows made with another tokenizer?"
        )
    trained = np.ones(len(ids), dtype=bool)
    if labels is not None:
        trained = labels != IGNORE_INDEX
        others = np.flatnonzero(trained & (labels != ids))
        if len(others):
            at = others[0]
            raise PaCAError(
                f"the field 'labels[{at}]' is {labels[at]}, but the token there is {ids[at]}. Labels are the tokens "
                f"themselves, or {IGNORE_INDEX} where they are not trained; they must not be shifted"
            )
    if mask is not None:
        if not np.isin(mask, (0, 1)).all():
            raise PaCAError("the field 'attention_mask' holds other numbers than 0 and 1, as for packed rows; unpack")
        inside = np.flatnonzero(mask)
        if len(inside) and inside[-1] - inside[0] + 1 != len(inside):
            raise PaCAError("the field 'attention_mask' is 0 between tokens; it may be 0 for padding alone")
        ids, trained = ids[inside], trained[inside]
    trained[:1] = False
    return Encoded(ids.astype(np.int32), trained), fields.unread()


def _numbers(fields: Fields, name: str, length: int | None = None) -> np.ndarray | None:
    values = fields.take(name)
    if values is None:
        return None
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        found = "a list" if isinstance(values, list) else kind(values)
        raise PaCAError(f"the field '{name}' is {found}, expected a list of whole numbers")
    if length is not None and len(values) != length:
        raise PaCAError(f"the field '{name}' has {len(values):,} entries, but 'input_ids' has {length:,}")
    return np.array(values, dtype=np.int64)
