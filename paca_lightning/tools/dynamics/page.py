"""One HTML page with everything: figures inside it, no scripts, nothing to fetch."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from paca_lightning.tools.dynamics.tables import Row, shown

MOST_RECITED = 30
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100% } table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top }
td.text, th.text { text-align: left; font-family: ui-monospace, monospace; white-space: pre-wrap }
mark { background: #fde68a } p.note { color: #555 }
"""


def page(
    title: str,
    notes: Sequence[str],
    figures: Mapping[str, tuple[bytes, str]],
    steps: Sequence[Row],
    recited: Sequence[Row],
) -> str:
    """The page.

    Args:
        title: Its heading.
        notes: Paragraphs under it.
        figures: PNGs and what they show, by heading.
        steps: The table of steps.
        recited: Rows that were recited exactly, the first ones first.
    """
    parts = [f"<h1>{escape(title)}</h1>", *(f'<p class="note">{escape(note)}</p>' for note in notes)]
    for heading, (image, caption) in figures.items():
        data = base64.b64encode(image).decode()
        parts += [f"<h2>{escape(heading)}</h2>", f"<p>{escape(caption)}</p>"]
        parts.append(f'<img alt="{escape(heading)}" src="data:image/png;base64,{data}">')
    parts += ["<h2>Training rows recited first</h2>", _recited(recited)]
    parts += ["<h2>All steps</h2>", _table([{name: _cell(value) for name, value in row.items()} for row in steps])]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f"<!DOCTYPE html>\n<html><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def _cell(value: Any) -> str:
    return str(value) if isinstance(value, int | str) else shown(value)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    lines = ("".join(f"<td>{escape(value)}</td>" for value in row.values()) for row in rows)
    return f"<table><tr>{heads}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _recited(rows: Sequence[Row]) -> str:
    if not rows:
        return "<p>None was recited word by word at any of these steps.</p>"
    heads = '<tr><th>first at step</th><th>still at the last</th><th class="text">shown, and recited</th></tr>'
    lines = [
        f"<tr><td>{row['first_step']}</td><td>{'yes' if row['at_last_step'] else 'no'}</td>"
        f'<td class="text">… {escape(row["context"])}<mark>{escape(row["continuation"])}</mark></td></tr>'
        for row in rows[:MOST_RECITED]
    ]
    more = len(rows) - len(lines)
    rest = f"<p>{more:,} more are in recited.csv.</p>" if more > 0 else ""
    return f"<table>{heads}{''.join(lines)}</table>{rest}"
