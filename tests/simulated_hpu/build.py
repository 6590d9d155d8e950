"""Builds the simulated HPU's C++ extension, once for each version of torch and of its source."""

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("simulated_hpu.cpp")
CACHE = Path(__file__).parents[2] / ".cache" / "simulated_hpu"


def build_extension() -> Path:
    """Returns the path of the compiled extension ``simulated_hpu.so``, from the cache if it has been built before.

    Compiles for about half a minute otherwise, aside and then renamed, so that concurrent and interrupted runs leave
    the cache whole. It does not load the extension: that would put the device into the calling process. Without a
    compiler, or with a PyTorch for CUDA, the calling test is skipped, or fails where ``CI`` is set.
    """
    if torch.version.cuda is not None:
        _nothing_tested("needs a PyTorch for the CPU: one for CUDA takes no second accelerator")
    source = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = CACHE / f"torch-{torch.__version__}-{source}" / "simulated_hpu.so"
    if library.exists():
        return library
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        _nothing_tested(f"needs a C++ compiler, and {compiler!r} is not found")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        built = Path(scratch) / library.name
        command = [compiler, "-shared", "-fPIC", "-std=c++20", "-O0", f"-DTORCH_EXTENSION_NAME={library.stem}"]
        command += [f"-isystem{path}" for path in [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]]
        command += [str(SOURCE), "-o", str(built)]
        command += [f"-L{path}" for path in cpp_extension.library_paths()]
        command += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.fail(f"the simulated HPU did not compile:\n{result.stderr}")
        built.rename(library)
    return library


def _nothing_tested(why: str) -> NoReturn:
    message = f"NOTHING ABOUT GAUDI WAS TESTED: the simulated HPU {why}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
