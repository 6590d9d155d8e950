"""The Intel Gaudi software: whether this process can use it, and why not.

The software (the "bridge", ``habana_frameworks.torch``) comes in Intel's containers. Its import takes seconds and adds
``torch.hpu``. It is therefore looked up with ``find_spec``, and imported only when an HPU is requested.
"""

import importlib
import importlib.util
import os

import torch

from paca_lightning.core.errors import PaCAError

_DOCS = "docs/gaudi.md lists the versions that belong together"


def bridge_installed() -> bool:
    """Whether the Gaudi software is installed. Does not import it."""
    return (
        importlib.util.find_spec("habana_frameworks") is not None
        and importlib.util.find_spec("habana_frameworks.torch") is not None
    )


def why_unavailable() -> str | None:
    """Why no HPU can be used here. None if one can be. Imports the Gaudi software if it is installed."""
    if not bridge_installed():
        return (
            "the Intel Gaudi software (habana_frameworks.torch) is not installed in this environment. "
            f"Run inside Intel's Gaudi PyTorch container; {_DOCS}"
        )
    # Since about 1.20 an unset variable selects eager mode; before, it selected lazy mode.
    os.environ.setdefault("PT_HPU_LAZY_MODE", "0")
    try:
        importlib.import_module("habana_frameworks.torch")
    except (ImportError, OSError, RuntimeError) as error:
        return (
            f"the Intel Gaudi software is installed, but cannot be imported with torch {torch.__version__}: {error}. "
            f"It only works with the torch of its own container; {_DOCS}"
        )
    if not hasattr(torch, "hpu"):
        return f"the Intel Gaudi software was imported but provides no torch.hpu: it is too old; {_DOCS}"
    if not torch.hpu.is_available() or torch.hpu.device_count() < 1:
        return (
            "the Intel Gaudi software is installed but finds no free device. Check `hl-smi`, that the container was "
            "started with `--runtime=habana -e HABANA_VISIBLE_DEVICES=all`, and that no other process holds the cards"
        )
    return None


def require_hpu() -> None:
    """Raise unless an HPU can be used in eager mode.

    Raises:
        PaCAError: If the software is missing, broken or too old, if no device is free, or if lazy mode is selected.
    """
    if reason := why_unavailable():
        raise PaCAError(f"Accelerator 'hpu' cannot be used: {reason}.")
    if os.environ["PT_HPU_LAZY_MODE"] != "0":
        raise PaCAError(
            f"PT_HPU_LAZY_MODE={os.environ['PT_HPU_LAZY_MODE']} selects Gaudi's lazy mode, which Intel no longer "
            "develops and paca_lightning does not support. Unset it or set PT_HPU_LAZY_MODE=0 before Python starts; "
            "for speed, compile the model with torch.compile(backend='hpu_backend')."
        )
