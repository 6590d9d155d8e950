"""The machine and the versions that figures were measured with; every report of figures carries them."""

import platform
import re
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("paca-lightning", "torch", "transformers", "peft", "bitsandbytes")
"""Packages whose versions change figures."""


def describe_environment() -> dict[str, Any]:
    """Date, platform, processor, and the versions of Python and of :data:`PACKAGES` (None: not installed)."""
    return {
        "date": date.today().isoformat(),
        "platform": platform.platform(),
        "processor": _processor_name(),
        "python": platform.python_version(),
        "versions": {name: _installed_version(name) for name in PACKAGES},
    }


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")  # Linux; Python names only the architecture there
    text = information.read_text() if information.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
