"""Finds the files of PyPI packages that ship a model or data, and whose own requirements are not needed."""

import importlib.util
import sys
from pathlib import Path


def package_directory(name: str, requirement: str) -> Path:
    """Directory of an installed package. It is not imported, as its own requirements are missing.

    Args:
        name: To import it by.
        requirement: To install it by, for the message with which the program ends if it is not there.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{name} is not installed. Run: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])
