"""Every writer on a disk that fills midway, with ``faulty_disk.c`` preloaded: a line of JSON for each try."""

import ctypes
import json
import os
import sys
import warnings
from pathlib import Path

from paca_lightning import PaCAError
from tests.reliability.test_disk_faults import content
from tests.reliability.writers import WRITERS

SHARES = (0.01, 0.5, 0.99)
"""Of what a writer writes: how much there is room for."""


def written() -> int:
    """Bytes that this process has written below $FAULTY_DISK."""
    function = ctypes.CDLL(None).faulty_disk_written
    function.restype = ctypes.c_long
    return int(function())


def main() -> None:
    """Write with room, then with too little in the same place."""
    warnings.simplefilter("ignore")
    directory = Path(sys.argv[1])
    for name, writer in WRITERS.items():
        place, start = directory / name / "place", written()
        writer(place)
        needed, before = written() - start, content(directory)
        for share in SHARES:
            os.environ["FAULTY_DISK_ROOM"] = str(written() + max(1, int(needed * share)))
            said = ""
            try:
                writer(place)
            except PaCAError as error:
                said = str(error)
            del os.environ["FAULTY_DISK_ROOM"]
            left = sorted(path.name for path in place.parent.iterdir() if path != place)
            print(json.dumps([name, share, needed, said, content(directory) == before, left]))


if __name__ == "__main__":
    main()
