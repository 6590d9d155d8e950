"""MMLU in miniature: made-up questions on four subjects, written in every form that the data set comes in."""

import csv

import datasets

from paca_lightning.tasks.mmlu.questions import Question

CHOSEN = ["anatomy", "formal_logic", "machine_learning", "sociology"]  # one of each category
SIZES = {"dev": 5, "validation": 3, "test": 4}


def rows_of(subject, split):
    """Made-up questions of different lengths, as rows of the hub's data set."""
    return [
        {
            "question": f"In {subject}, what does the {split} question {number} ask{' again' * number}?",
            "subject": subject,
            "choices": [
                str(number),
                f"the answer {number}",
                f"nothing of {subject}",
                "all that it asks " * number + "x",
            ],
            "answer": (number + len(subject)) % 4,
        }
        for number in range(SIZES[split])
    ]


def all_rows(split):
    return [row for subject in CHOSEN for row in rows_of(subject, split)]


def write_csv_folders(root):
    for split in SIZES:
        short = "val" if split == "validation" else split
        (root / "data" / short).mkdir(parents=True)
        for subject in CHOSEN:
            with (root / "data" / short / f"{subject}_{short}.csv").open("w", newline="") as file:
                for row in rows_of(subject, split):
                    csv.writer(file).writerow([row["question"], *row["choices"], "ABCD"[row["answer"]]])


def write_saved_by_subject(root):
    for split in SIZES:
        for subject in CHOSEN:
            datasets.Dataset.from_list(rows_of(subject, split)).save_to_disk(root / subject / split)


def write_saved_whole(root):
    splits = {split: datasets.Dataset.from_list(all_rows(split)) for split in SIZES}
    datasets.DatasetDict(splits).save_to_disk(root)


def write_parquet_by_subject(root):
    for split in SIZES:
        for subject in CHOSEN:
            (root / subject).mkdir(parents=True, exist_ok=True)
            rows = datasets.Dataset.from_list(rows_of(subject, split))
            rows.to_parquet(root / subject / f"{split}-00000-of-00001.parquet")


def write_parquet_all(root):
    (root / "all").mkdir(parents=True)
    for split in SIZES:
        datasets.Dataset.from_list(all_rows(split)).to_parquet(root / "all" / f"{split}-00000-of-00001.parquet")


FORMS = [write_csv_folders, write_saved_by_subject, write_saved_whole, write_parquet_by_subject, write_parquet_all]


def question(**overrides):
    fields = {"where": "here", "subject": "anatomy", "question": "Why?", "choices": ("1", "2", "3", "4"), "answer": 2}
    return Question(**(fields | overrides))
