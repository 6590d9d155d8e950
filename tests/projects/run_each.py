"""Runs ``python train.py ...`` of several projects in one interpreter, which imports PyTorch and Lightning once.

Its input is JSON, a list of ``[directory, arguments]``; its output one string for each, what the run printed. Nothing
here imports paca_lightning, so that a project's first run has only what its config names.
"""

import contextlib
import io
import json
import os
import runpy
import sys


def train(directory: str, arguments: list[str]) -> str:
    """What ``train.py`` prints when it runs in its directory with these arguments."""
    os.chdir(directory)
    sys.argv = ["train.py", *arguments]
    sys.path.insert(0, directory)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            runpy.run_path("train.py", run_name="__main__")
    except BaseException:
        sys.stderr.write(printed.getvalue())
        raise
    finally:
        sys.path.remove(directory)
    return printed.getvalue()


if __name__ == "__main__":
    runs = json.load(sys.stdin)
    json.dump([train(*run) for run in runs], sys.stdout)
