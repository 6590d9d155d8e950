"""Figures of ``bench`` and ``estimate`` as Markdown tables and plots, for scripts/performance.py."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from paca_lightning.tools.bench import results
from paca_lightning.tools.memory.timeline import Kind

Run = dict[str, Any]
"""One command's figures: ``rows`` and ``setup`` of its JSON, the ``command``, and its ``label`` in the table."""

NAMES = {
    "paca": "PaCA",
    "lora": "LoRA",
    "lora-narrow": "LoRA, bf16 adapters",
    "dora": "DoRA",
    "qfloor": "NF4 floor",
    "qpaca": "QPaCA",
    "qlora": "QLoRA",
    "LoRA": "LoRA, fp32 adapters",
    "LoRA, adapters as narrow as the model": "LoRA, bf16 adapters",
    "full fine-tuning": "full",
}
OURS = ("paca", "qpaca", "PaCA")


def bench_table(runs: list[Run]) -> str:
    """Runs of ``bench``, one row for each method."""
    columns = ["method", "step ms", "x floor", "quartiles", "forward", "backward", "optimizer"]
    columns += ["saved MiB", "peak MiB", "trainable", "tokens/s"]
    rows = []
    for run in runs:
        for row in run["rows"]:
            low, high = row["ratio_quartiles"]
            ratio = f"{row['ratio_to_floor']:.3f}"
            if row["floor"] != "floor":
                ratio += f" x {NAMES[row['floor']]}"
            rows.append(
                [
                    run["label"],
                    _method(row),
                    f"{row['step_ms']:.1f}",
                    _strong(row, ratio) + (" (noisy)" if row["noisy"] else ""),
                    "" if row["method"] == "floor" else f"{low:.3f}-{high:.3f}",
                    *(f"{row[f'{phase}_ms']:.1f}" for phase in ("forward", "backward", "optimizer")),
                    f"{row['saved_bytes'] / 2**20:.1f}",
                    "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}",
                    f"{row['trainable_parameters']:,}",
                    f"{row['tokens_per_second']:,.0f}",
                ]
            )
    return _table(columns, rows)


def estimate_table(runs: list[Run]) -> str:
    """Runs of ``estimate``, one row for each method, in GiB of one device."""
    columns = ["GiB", *(kind.name.lower().replace("_", " ") for kind in Kind), "peak", "x LoRA", "longest that fits"]
    rows = []
    for run in runs:
        lora = figure(run, "LoRA", "peak_bytes")
        for row in run["rows"]:
            sizes = [row[f"{kind.name.lower()}_bytes"] for kind in Kind]
            longest = row.get("max_tokens")
            rows.append(
                [
                    run["label"],
                    _method(row),
                    *(f"{size / 2**30:.2f}" if size else "0" for size in sizes),
                    _strong(row, f"{row['peak_bytes'] / 2**30:.2f}"),
                    _strong(row, f"{row['peak_bytes'] / lora:.2f}"),
                    "none" if longest == 0 else f"{longest:,}" if longest else "",
                ]
            )
    return _table(columns, rows)


def figure(run: Run, method: str, name: str) -> Any:
    """A figure of a method's first row in a run; None if the method has no row."""
    return next((row[name] for row in run["rows"] if row["method"] == method), None)


def source(runs: list[Run]) -> str:
    """Commands, date, machine and versions of figures."""
    commands = "".join(f"    {run['command']}\n" for run in runs)
    setup = runs[0]["setup"]
    dates = sorted({run["setup"]["date"] for run in runs})
    facts = [" to ".join(dict.fromkeys([dates[0], dates[-1]]))]
    if "workload" in setup:
        threads = sorted({run["setup"]["workload"]["threads"] for run in runs})
        facts += [f"{'/'.join(map(str, threads))} threads of an {setup['processor']}", setup["workload"]["dtype"]]
        facts += [f"{'/'.join(str(n) for n in sorted({run['setup']['steps'] for run in runs}))} timed steps"]
    else:
        facts += [
            f"traced in {' + '.join(format(run['setup']['seconds'], '.0f') for run in runs)} s",
            setup["precision"],
        ]
    facts += [f"{name} {version}" for name, version in setup["versions"].items() if version]
    return f"{commands}\n{', '.join(facts)}."


def promises_table(settings: dict[str, list[Run]]) -> str:
    """The paper's four promises against LoRA, beside what was measured here. Settings without figures are left out.

    Times are ratios to the floor, which are taken step by step. Tokens a second are their inverse.
    """
    rows = []

    def compare(
        promise: str, paper: str, name: str, what: str, key: str, methods: tuple[str, str, str], inverse: bool = False
    ) -> None:
        if name in settings:
            own, *others = (figure(settings[name][0], method, key) for method in methods)
            if own and any(others):  # not every setting has every figure
                changes = (_change(*((one, own) if inverse else (own, one))) if one else "" for one in others)
                rows.append(["", promise, paper, what, *changes])

    measured, traced = ("paca", "lora", "lora-narrow"), ("PaCA", "LoRA", "LoRA, adapters as narrow as the model")
    bench = {
        "small-512": "4 layers of hidden 1024, 2 x 512 tokens, CPU",
        "small-128": "the same, 1 x 128 tokens, CPU",
        "smollm2": "SmolLM2-135M, 1 x 256 tokens, CPU",
        "llama3-8b-4": "4 layers of Llama-3-8B, 1 x 512 tokens, CPU",
    }
    eight_billion = "Llama-3-8B, 2,048 tokens, traced"
    for name, what in bench.items():
        compare("time of a step", "22% less", name, what, "ratio_to_floor", measured)
    for name, what in bench.items():
        compare("peak memory", "16% less", name, what, "peak_bytes", measured)
    compare("peak memory", "16% less", "estimate-8b", eight_billion, "peak_bytes", traced)
    compare("longest sequence", "23% more", "estimate-8b", "Llama-3-8B in 80 GB, traced", "max_tokens", traced)
    for name, what in bench.items():
        compare("tokens a second", "16% more", name, what, "ratio_to_floor", measured, inverse=True)
    return _table(["promise", "paper", "here, on", "PaCA against LoRA", "against LoRA with bf16 adapters"], rows)


def bars(runs: list[Run], path: Path) -> None:
    """Draw step time, saved bytes and peak of one run of ``bench``."""
    results.plot(runs[0]["rows"], runs[0]["setup"]["title"], path)


def lines(runs: list[Run], path: Path) -> None:
    """Draw step time and saved bytes over tokens, from one run of ``bench`` for each length."""
    panels = {"step time, x floor": ("ratio_to_floor", 1), "saved for backward, MiB": ("saved_bytes", 2**20)}
    tokens = [run["setup"]["workload"]["tokens"] for run in runs]
    figure = _figure(8.4, 3.2)
    for position, (title, (name, unit)) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), position)
        for number, row in enumerate(runs[0]["rows"]):
            axes.plot(tokens, [run["rows"][number][name] / unit for run in runs], marker="o", label=results.label(row))
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [str(count) for count in tokens])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def stacks(runs: list[Run], path: Path) -> None:
    """Draw the memory of a device by kind, from runs of ``estimate``."""
    rows = [(run["label"], row) for run in runs for row in run["rows"]]
    labels = [" ".join(filter(None, (label, NAMES.get(row["method"], row["method"])))) for label, row in rows]
    figure = _figure(8.4, 1.2 + 0.3 * len(rows))
    axes = figure.add_subplot()
    left = [0.0] * len(rows)
    for kind in Kind:
        sizes = [row[f"{kind.name.lower()}_bytes"] / 2**30 for _, row in rows]
        axes.barh(labels, sizes, left=left, label=kind.name.lower().replace("_", " "))
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("peak memory of a device, GiB")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _method(row: dict[str, Any]) -> str:
    method, plus, recomputed = row["method"].partition("+")
    name = NAMES.get(method, method) + (f", {recomputed}" if plus else "")
    return _strong(row, f"{name} r={row['r']}" if row.get("r") else name)


def _strong(row: dict[str, Any], text: str) -> str:
    return f"**{text}**" if row["method"].partition("+")[0] in OURS else text


def _change(own: float, other: float) -> str:
    percent = 100 * (own / other - 1)
    return f"{abs(percent):.0f}% {'less' if percent < 0 else 'more'}"


def _table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table. The first cell of a row is its run's label, shown if there are several."""
    rows = list(rows)
    if len({row[0] for row in rows}) > 1:
        columns = ["", *columns]
    else:
        rows = [row[1:] for row in rows]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
