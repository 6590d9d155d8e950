"""What became of the rows of a split: bad rows, fields that nothing used, and what the chat template did."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from paca_lightning.tasks.data.decode import marked_text
from paca_lightning.tasks.data.records import WHOLE_FILE, with_place
from paca_lightning.tasks.data.remarks import REMARKS

_LISTED = 20  # bad rows that a message lists
_EXAMPLE = 600  # characters of a decoded example


@dataclass(frozen=True)
class SplitReport:
    """What became of the rows of a split.

    Attributes:
        bad_rows: What is wrong with each row, or file, that cannot be used.
        bad_files: How many of them are files that cannot be read to their end.
        formats: Conversations by the format of their rows.
        unread: Conversations by the name of a field that nothing used.
        remarks: Conversations by the kind of what the chat template did to them (`remarks.REMARKS`).
        examples: Of each kind the first conversation: its row, and its text with the trained tokens in ⟦ ⟧.
    """

    bad_rows: list[str] = field(default_factory=list)
    bad_files: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    remarks: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def bad_row_list(self, location: str) -> str:
        """The bad rows and files as a message: one alone, or a count and the first of them."""
        if len(self.bad_rows) == 1:
            return self.bad_rows[0]
        listed = "\n".join(f"  {row}" for row in self.bad_rows[:_LISTED])
        more = f"\n  and {len(self.bad_rows) - _LISTED:,} more" if len(self.bad_rows) > _LISTED else ""
        rows = len(self.bad_rows) - self.bad_files
        files = f"{self.bad_files:,} files cannot be read to their end" if self.bad_files else ""
        unused = f"{rows:,} rows cannot be used" if rows else ""
        remedy = "Correct them" if files else "Correct them, or set on_bad_row: drop to leave them out"
        return f"{location}: {' and '.join(filter(None, (unused, files)))}. {remedy}.\n{listed}{more}"

    def describe_unused(self) -> list[str]:
        """Sentences on dropped rows and unused fields."""
        sentences = []
        if self.bad_rows:
            sentences.append(f"{len(self.bad_rows):,} bad rows dropped, the first: {self.bad_rows[0]}")
        if self.unread:
            fields = ", ".join(f"{name} ({count:,})" for name, count in self.unread.items())
            sentences.append(f"Fields not used, and in how many conversations: {fields}.")
        return sentences

    def describe_template(self) -> list[str]:
        """Sentences on what the chat template did, each with an example."""
        return [
            f"In {count:,} conversations, the chat template {REMARKS[kind]}. The first, with what is trained in ⟦ ⟧: "
            f"{self.examples[kind]}"
            for kind, count in self.remarks.items()
        ]


def split_report(tokens: Dataset, locations: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> SplitReport:
    """The report of a tokenized split.

    Args:
        tokens: Columns as `tokenization.tokenized` returns them.
        locations: The files, by number.
        tokenizer: Decodes the examples.
    """
    names = ["error", "format", "unread", "remarks", "piece", "file", "row"]
    table = tokens.select_columns(names).with_format("arrow")[:]
    wrong = table.filter(pc.is_valid(table.column("error")))
    errors = [with_place(row["error"], locations[row["file"]], row["row"]) for row in wrong.to_pylist()]
    first_pieces = table.filter(pc.equal(table.column("piece"), 0))
    counts = {}
    for name in ("format", "unread", "remarks"):
        column = first_pieces.column(name)
        values = pc.value_counts(column if name == "format" else pc.list_flatten(column))
        counts[name] = Counter({entry["values"]: entry["counts"] for entry in values.to_pylist() if entry["values"]})
    examples = {}
    remarks = table.column("remarks").combine_chunks()
    for kind in counts["remarks"]:
        first = pc.list_parent_indices(remarks)[pc.index(pc.list_flatten(remarks), kind).as_py()]
        sample = tokens[first.as_py()]
        text = marked_text(tokenizer, sample["input_ids"], sample["trained"])
        more = "..." * (len(text) > _EXAMPLE)
        examples[kind] = f"{locations[sample['file']]}, row {sample['row']}: {text[:_EXAMPLE]}{more}"
    unread = dict(counts["unread"].most_common())
    files = pc.sum(pc.equal(wrong.column("row"), WHOLE_FILE)).as_py() or 0
    return SplitReport(errors, files, dict(counts["format"]), unread, dict(counts["remarks"]), examples)
