"""The simulated bridge: puts the device "hpu" and ``torch.hpu`` into this process when imported, as the real one does.

``torch.hpu`` holds two groups of names and nothing else, so that a call of any other name fails: those that
``paca_lightning`` calls (``CALLED_BY_US``; all of them exist in the real bridge), and those that PyTorch and Lightning
call on any device module. The compiler backend ``hpu_backend`` traces and then runs eagerly. The operator that
bitsandbytes calls for NF4 is here too. Environment variables: ``SIMULATED_HPU_LIBRARY`` is the path of the compiled
extension, ``SIMULATED_HPU_COUNT`` the number of cards (8 by default).
"""

import functools
import importlib.util
import os
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo

CALLED_BY_US = ("is_available", "device_count", "manual_seed_all", "memory_stats", "get_device_name", "synchronize")

_spec = importlib.util.spec_from_file_location("simulated_hpu", os.environ["SIMULATED_HPU_LIBRARY"])
_device = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_device)


class _DeviceContext:
    def __init__(self, device: object) -> None:
        _check(device)

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def _check(device: object) -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    if index not in (None, 0):
        raise RuntimeError(f"a process owns one HPU, hpu:0; got {device}")


def _memory_stats(device: object = None) -> dict[str, int]:
    _check(0 if device is None else device)
    return _device.memory_stats()


hpu = types.ModuleType("torch.hpu")
# Called by paca_lightning.
hpu.is_available = lambda: _device.device_count() > 0
hpu.device_count = _device.device_count
hpu.manual_seed_all = lambda seed: None  # the device shares the CPU's generator, which torch.manual_seed has seeded
hpu.memory_stats = _memory_stats
hpu.get_device_name = lambda device=None: "simulated HPU"
hpu.synchronize = lambda device=None: None
# Called by PyTorch: lazy initialisation, FSDP2's streams, checkpointing's RNG state.
hpu.is_initialized = lambda: _device.memory_stats()["NumAllocs"] > 0  # the first tensor acquires the card
hpu._lazy_init = lambda: None
hpu._is_in_bad_fork = lambda: False
hpu.current_device = lambda: 0
hpu.set_device = _check
hpu.device = _DeviceContext
hpu.Stream = functools.partial(torch.Stream, "hpu")
hpu.Event = functools.partial(torch.Event, "hpu")
hpu.stream = lambda stream: stream
hpu.current_stream = lambda device=None: torch.accelerator.current_stream()
hpu.get_rng_state = lambda device=None: torch.get_rng_state()
hpu.set_rng_state = lambda state, device=None: torch.set_rng_state(state)

torch._register_device_module("hpu", hpu)


@torch._dynamo.register_backend(name="hpu_backend")
def _hpu_backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def _dequantize_nf4(
    packed: torch.Tensor, absmax: torch.Tensor, blocksize: int, *, out_shape: list[int], out_dtype: torch.dtype
) -> torch.Tensor:
    """Two weights a byte, the first in the high half: a level of NF4 times the scale of its block."""
    from bitsandbytes.functional import get_4bit_type

    codes = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1, blocksize)
    levels = get_4bit_type("nf4", device=packed.device)[codes.long()]
    return (levels * absmax.float()[:, None]).to(out_dtype).reshape(-1)[: out_shape[0]]


_operators = torch.library.Library("hpu", "DEF")
_operators.define(
    "dequantize_nf4(Tensor packed, Tensor absmax, int blocksize, *, SymInt[] out_shape, ScalarType out_dtype) -> Tensor"
)
_operators.impl("dequantize_nf4", _dequantize_nf4, "HPU")
