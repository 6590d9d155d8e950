"""The simulated bridge: puts the device "hpu" and ``torch.hpu`` into this process when imported, as the real one does.

``torch.hpu`` holds two groups of names and nothing else, so that a call of any other name fails: those that
``paca_lightning`` calls (``CALLED_BY_US``; all of them exist in the real bridge), and those that PyTorch and Lightning
call on any device module. The environment variable ``SIMULATED_HPU_LIBRARY`` holds the path of the compiled extension,
``SIMULATED_HPU_COUNT`` the number of cards (8 by default).
"""

import importlib.util
import os
import types

import torch

CALLED_BY_US = ("is_available", "device_count", "manual_seed_all", "memory_stats", "get_device_name", "synchronize")

_spec = importlib.util.spec_from_file_location("simulated_hpu", os.environ["SIMULATED_HPU_LIBRARY"])
_device = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_device)


class _Event:
    def record(self, stream: object = None) -> None: ...
    def wait(self, stream: object = None) -> None: ...
    def synchronize(self) -> None: ...


class _Stream:
    def __init__(self, *_: object, **__: object) -> None: ...
    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None: ...
    def wait_stream(self, other: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


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
hpu.Stream = _Stream
hpu.Event = _Event
hpu.stream = lambda stream: stream
hpu.current_stream = lambda device=None: _Stream()
hpu.get_rng_state = lambda device=None: torch.get_rng_state()
hpu.set_rng_state = lambda state, device=None: torch.set_rng_state(state)

torch._register_device_module("hpu", hpu)
