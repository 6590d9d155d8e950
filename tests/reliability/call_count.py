"""How many functions are called: a measure of work that no clock and no other process changes."""

import sys
from typing import Any


class CallCount:
    """Counts the functions that are called between ``start`` and ``stop``, in Python and in C."""

    def __init__(self) -> None:
        self.count = 0

    def start(self) -> None:
        self.count = 0
        sys.setprofile(self._note)

    def stop(self) -> None:
        sys.setprofile(None)

    def _note(self, frame: Any, event: str, argument: Any) -> None:
        self.count += event in ("call", "c_call")
