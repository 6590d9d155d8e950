"""Where figures come from: the day, the machine and the versions, written beside them."""

import platform
import re
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("paca-lightning", "torch", "transformers", "peft", "bitsandbytes")


def provenance() -> dict[str, Any]:
    """Date, platform, processor, and the versions of Python and of the packages that matter."""
    return {
        "date": date.today().isoformat(),
        "platform": platform.platform(),
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    found = (
        re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE) if information.exists() else None
    )
    return found[1] if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
