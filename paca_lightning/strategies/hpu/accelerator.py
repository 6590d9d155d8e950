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

    A process owns one card and calls it ``hpu:0``, whichever it is.

    Raises:
        PaCAError: On construction, if no HPU can be used here. The message says why.
    """

    def __init__(self) -> None:
        # Lightning only asks `is_available()` and reports nothing but its answer: the reason is given here.
        require_hpu()

    @override
    def setup_device(self, device: torch.device) -> None:
        """Acquires the card of this process and seeds its generator as ``torch.manual_seed`` seeded the CPU's."""
        if device.type != "hpu":
            raise PaCAError(
                f"the HPU accelerator was given a strategy for device '{device}'. Use strategy='auto', 'hpu_single', "
                "'hpu_ddp' or 'hpu_fsdp2'."
            )
        # A DeviceMesh calls `set_device(local_rank)`, which fails on any rank but 0, unless the device is acquired.
        torch.empty(1, device=device)
        torch.get_device_module("hpu").manual_seed_all(torch.initial_seed())

    @override
    def teardown(self) -> None:
        """Leaves the card to the process, which holds it until it ends."""

    @override
    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """The card's memory counters, in bytes (``InUse``, ``MaxInUse``, ``Limit``) and numbers of allocations."""
        return dict(torch.get_device_module("hpu").memory_stats(device))

    @staticmethod
    @override
    def parse_devices(devices: int | str | list[int]) -> int:
        """The number of cards from Lightning's ``devices``: a number, or -1 for all.

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
        # A launched process sees cards that its siblings hold as taken: only the launching one can compare.
        visible = HPUAccelerator.auto_device_count()
        if "LOCAL_RANK" not in os.environ and count > visible:
            raise PaCAError(f"devices={devices}: {visible} HPU(s) are visible here (see `hl-smi`).")
        return count

    @staticmethod
    @override
    def get_parallel_devices(devices: int) -> list[torch.device]:
        """One ``hpu:0`` for each process."""
        return [torch.device("hpu", 0)] * devices

    @staticmethod
    @override
    def auto_device_count() -> int:
        """All visible cards."""
        return int(torch.get_device_module("hpu").device_count())

    @staticmethod
    @override
    def is_available() -> bool:
        """Whether an HPU can be used here. Imports the bridge if it is installed, and nothing where it is not."""
        return why_unavailable() is None

    @staticmethod
    @override
    def name() -> str:
        """The name for ``Trainer(accelerator=...)``."""
        return "hpu"
