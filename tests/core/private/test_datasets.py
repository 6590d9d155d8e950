"""Canaries for the private APIs of datasets."""

from pathlib import Path

from datasets import Dataset, load_from_disk

from paca_lightning.core.private import datasets as private
from tests.core.private.canary import canary, check_coverage


@canary("datasets.fingerprint_of")
def test_fingerprint_of(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "data")
    first, second = (load_from_disk(tmp_path / "data") for _ in range(2))
    assert private.fingerprint_of(first) == private.fingerprint_of(second)
    assert private.fingerprint_of(first) != private.fingerprint_of(first.select([1]))


def test_every_function_has_a_canary() -> None:
    check_coverage("datasets")
