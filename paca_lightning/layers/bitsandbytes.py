"""Loading bitsandbytes: it registers the NF4 operators, and on Gaudi its version decides whether they work."""

import functools
import logging
import os
import warnings

import torch
from packaging.version import Version

from paca_lightning.core.errors import PaCAError

HPU_VERSIONS = (Version("0.47"), Version("0.49.2"))
"""The oldest bitsandbytes with operators for Gaudi, and the newest recommended there."""

# On CPUs with AVX512-BF16, importing bitsandbytes logs an error about a missing package that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def load_operators(device: torch.device) -> None:
    """Register the operators of ``torch.ops.bitsandbytes``. The import takes seconds, so call this at first use.

    Args:
        device: Where they will run.

    Raises:
        PaCAError: If the device is an HPU and bitsandbytes is too old for it.
    """
    import bitsandbytes  # noqa: F401

    if torch.compiler.is_compiling():
        return
    if device.type == "hpu":
        check_hpu_backend()
    _make_levels(device)


def check_hpu_backend() -> None:
    """Check that the installed bitsandbytes supports Gaudi. A newer one than recommended warns, once on a host.

    Raises:
        PaCAError: If it is too old.
    """
    import bitsandbytes

    _check_hpu_version(bitsandbytes.__version__)


@functools.cache
def _check_hpu_version(installed: str) -> None:
    oldest, newest = HPU_VERSIONS
    remedy = f"pip install 'bitsandbytes>={oldest},<={newest}'"
    if Version(installed) < oldest:
        raise PaCAError(f"bitsandbytes {installed} has no NF4 operators for Gaudi, which came with {oldest}: {remedy}.")
    if Version(installed) > newest and os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            f"bitsandbytes {installed} is newer than is recommended for NF4 on Gaudi. If it fails there: {remedy}.",
            stacklevel=2,
        )


@functools.cache
def _make_levels(device: torch.device) -> None:
    """Make bitsandbytes create its NF4 levels in fp32: it keeps them in the default dtype of their first use (0.50).

    Lightning's ``bf16-true`` sets that to bf16, and the levels would stay rounded for the rest of the process.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        torch.ops.bitsandbytes.quantize_4bit.default(torch.ones(1, 64, device=device), 64, "nf4", torch.uint8)
    finally:
        torch.set_default_dtype(default)
