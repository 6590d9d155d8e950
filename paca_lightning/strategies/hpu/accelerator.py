"""The Lightning accelerator for Intel Gaudi cards."""

import os
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from typing_extensions import override

from paca_lightning.core.errors import PaCAError
from paca_lightning.strategies.hpu.bridge import require_hpu, why_unavailable


class HPUAccelerator(Accelerator):
    """Intel Gaudi cards (HPUs), in eager mode or with ``torch.compile(backend="hpu_backend")``.

    A process uses one card, which it always calls ``hpu:0``.

    Raises:
        PaCAError: On construction, if no HPU can be used here. The message says why.
    """

    def __init__(self) -> None:
        # Lightning reports only that `is_available()` is false. The error here says why.
        require_hpu()

    @override
    def setup_device(self, device: torch.device) -> None:
        """Acquire the card of this process and seed its generator with the seed of ``torch.manual_seed``."""
        if device.type != "hpu":
            raise PaCAError(
                f"The HPU accelerator was given a strategy for device '{device}'. Use strategy='auto', 'hpu_single', "
                "'hpu_ddp' or 'hpu_fsdp2'."
            )
        # A DeviceMesh calls `set_device(local_rank)` unless the device is acquired, which fails on any rank but 0.
        torch.empty(1, device=device)
        torch.get_device_module("hpu").manual_seed_all(torch.initial_seed())

    @override
    def teardown(self) -> None:
        """Do nothing: the process holds the card until it ends."""

    @override
    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """The card's memory counters: bytes (``InUse``, ``MaxInUse``, ``Limit``) and numbers of allocations."""
        return dict(torch.get_device_module("hpu").memory_stats(device))

    @staticmethod
    @override
    def parse_devices(devices: int | str | list[int]) -> int:
        """The number of cards that Lightning's ``devices`` asks for: a number, or -1 for all.

        Raises:
            PaCAError: For a list of indices, or for more cards than there are.
        """
        if not isinstance(devices, int | str) or not str(devices).lstrip("-").isdigit():
            raise PaCAError(
                f"devices={devices!r}: on HPU give the number of cards. To choose which, start the container or the "
                "process with HABANA_VISIBLE_MODULES=0,1,..."
            )
        count = int(devices)
        if count == -1:
            return HPUAccelerator.auto_device_count()
        # A launched process does not see cards that its siblings hold, so only the launching process can compare.
        visible = HPUAccelerator.auto_device_count()
        if "LOCAL_RANK" not in os.environ and count > visible:
            raise PaCAError(f"devices={devices}: {visible} HPU(s) are visible here (see `hl-smi`).")
        return count

    @staticmethod
    @override
    def get_parallel_devices(devices: int) -> list[torch.device]:
        """One device per process, each called ``hpu:0``."""
        return [torch.device("hpu", 0)] * devices

    @staticmethod
    @override
    def auto_device_count() -> int:
        """Number of visible cards."""
        return int(torch.get_device_module("hpu").device_count())

    @staticmethod
    @override
    def is_available() -> bool:
        """Whether an HPU can be used here. Imports the Gaudi software if it is installed."""
        return why_unavailable() is None

    @staticmethod
    @override
    def name() -> str:
        """The name for ``Trainer(accelerator=...)``."""
        return "hpu"
