"""How fast rows are prepared, beside the tokenizer alone in `datasets.map`.

Writes conversations of about 300 tokens and has them prepared by both in turn, each time in a process of its own, with
an empty cache and the same number of worker processes. The clock starts when everything is imported:

- paca: `InstructionDataModule.prepare_data`: the tokenizer loaded, rows read, converted, checked, rendered, tokenized,
  masked and cached;
- datasets: `Dataset.map` with `apply_chat_template` and the tokenizer, both loaded already, of rows in memory.

    python -m scripts.preparation_speed models/SmolLM2-135M-Instruct
    python -m scripts.preparation_speed models/SmolLM2-135M-Instruct --rows 5000 20000 --rounds 9 --turns 6

A ratio is the time of datasets over that of paca in the same round; shown are the median of all rounds, the least and
the largest. CPU time is that of the process and of those it started, and depends less on what else the machine does.
`each further row` is the difference between the most and the fewest rows, so without what a run costs once.
"""

import argparse
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIDES = ("paca", "datasets")
WORDS = 150  # of this repository's documents: about 300 tokens of SmolLM2's tokenizer
MAX_LENGTH = 2048

Seconds = dict[str, float]
"""By kind: `wall` and `cpu`."""


def write_rows(file: Path, count: int, turns: int) -> None:
    """Write conversations of `turns` messages each, of text from this repository's documents."""
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/**/*.md")))
    words = re.findall(r"\S+\s*", text)
    rng = random.Random(0)  # noqa: S311 - no secret
    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            messages = []
            for turn in range(turns):
                length = rng.randint(WORDS // turns // 2, WORDS // turns * 3 // 2)
                start = rng.randrange(len(words) - length)
                content = "".join(words[start : start + length]).strip()
                messages.append({"role": ("user", "assistant")[turn % 2], "content": content})
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def with_paca(file: str, tokenizer: str, cache: str, processes: int) -> Callable[[], object]:
    """What is measured of this project."""
    from paca_lightning.tasks import InstructionDataModule

    data = InstructionDataModule(tokenizer, train=file, max_length=MAX_LENGTH, cache_dir=cache, num_proc=processes)
    return data.prepare_data


def with_datasets(file: str, tokenizer: str, cache: str, processes: int) -> Callable[[], object]:
    """What is measured of `datasets`, as its users write it."""
    import datasets
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache)

    def tokenize(batch: dict[str, Any]) -> Any:
        texts = loaded.apply_chat_template(batch["messages"], tokenize=False)
        return loaded(texts, add_special_tokens=False, truncation=True, max_length=MAX_LENGTH)

    return lambda: rows.map(tokenize, batched=True, num_proc=processes, remove_columns=rows.column_names)


def seconds() -> Seconds:
    """The clock, and the user CPU time of this process and of those it started."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"wall": time.perf_counter(), "cpu": sum(usage.ru_utime for usage in usages)}


def measure(side: str, file: str, arguments: argparse.Namespace) -> None:
    """Print what one preparation takes, as JSON."""
    with tempfile.TemporaryDirectory() as cache:
        make = with_paca if side == "paca" else with_datasets
        prepare = make(file, arguments.tokenizer, cache, arguments.processes)
        start = seconds()
        prepare()
        print(json.dumps({kind: end - start[kind] for kind, end in seconds().items()}))


def in_a_process(side: str, file: Path) -> Seconds:
    """What one preparation takes in a new process, which gets the arguments of this one."""
    done = subprocess.run(  # noqa: S603 - this script
        [sys.executable, "-m", "scripts.preparation_speed", *sys.argv[1:], "--measure", side, str(file)],
        cwd=ROOT,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},  # a thread for each of the processes
        check=True,
        capture_output=True,
        text=True,
    )
    found: Seconds = json.loads(done.stdout.splitlines()[-1])
    return found


def show(rounds: list[dict[tuple[int, str], Seconds]], counts: list[int]) -> None:
    """Print the table of all rounds so far."""
    print(f"\n{len(rounds)} rounds | paca | datasets | ratio: median (least to largest)\n--- | --- | --- | ---")
    for kind in ("wall", "cpu"):
        for count in counts:
            pairs = [(found[count, "paca"][kind], found[count, "datasets"][kind]) for found in rounds]
            print(_line(f"{kind}, {count:,} rows", pairs, 1, "s"))
        if len(counts) > 1:
            first, last = counts[0], counts[-1]
            pairs = [
                (paca, other)
                for found in rounds
                for paca, other in [tuple(found[last, side][kind] - found[first, side][kind] for side in SIDES)]
            ]
            print(_line(f"{kind}, each further row", pairs, 1e3 / (last - first), "ms"), flush=True)


def _line(name: str, pairs: list[tuple[float, ...]], scale: float, unit: str) -> str:
    paca, other = (statistics.median(times) * scale for times in zip(*pairs, strict=True))
    ratios = [pair[1] / pair[0] for pair in pairs]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"{name} | {paca:.2f} {unit} | {other:.2f} {unit} | {spread}"


def main() -> None:
    """Measure in rounds, and print the table after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tokenizer", help="directory or hub id of a tokenizer with a chat template")
    parser.add_argument("--rows", type=int, nargs="+", default=[5000, 20000], help="numbers of rows to prepare")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2, help="messages of a conversation")
    parser.add_argument("--processes", type=int, default=2, help="processes that tokenize")
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure, arguments)
        return
    counts, rounds = sorted(arguments.rows), []
    with tempfile.TemporaryDirectory() as directory:
        files = {count: Path(directory) / f"{count}.jsonl" for count in counts}
        for count, file in files.items():
            write_rows(file, count, arguments.turns)
        for number in range(arguments.rounds):
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            rounds.append({(count, side): in_a_process(side, file) for count, file in files.items() for side in order})
            show(rounds, counts)


if __name__ == "__main__":
    main()
