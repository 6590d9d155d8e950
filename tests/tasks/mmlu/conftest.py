"""Fixtures of the MMLU tests."""

import pytest

from tests.mmlu_files import write_csv_folders
from tests.tiny import tiny_tokenizer


@pytest.fixture
def mmlu(tmp_path):
    write_csv_folders(tmp_path / "mmlu")
    return str(tmp_path / "mmlu")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()
