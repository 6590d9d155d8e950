"""Private APIs of Hugging Face datasets (read in 5.2)."""

from typing import Any


def fingerprint_of(dataset: Any) -> str:
    """Hash of a data set's content and of what was done to it; the library's caches use it, with no public name."""
    fingerprint: str = dataset._fingerprint
    return fingerprint
