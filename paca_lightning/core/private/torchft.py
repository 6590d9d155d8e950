"""What torchft keeps to itself: how far DiLoCo is between two exchanges, and how changes and checkpoints travel.

A run that stops between two exchanges resumes there only if it knows the inner steps since the last one and the
parameters that it left. ``DiLoCo`` has no state of its own to save.
"""

import os
import urllib.request
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor


def inner_steps(diloco: Any) -> int:
    """Inner steps of a ``torchft.local_sgd.DiLoCo`` since its last exchange."""
    return int(diloco._local_step)


def set_inner_steps(diloco: Any, steps: int) -> None:
    """Make a DiLoCo go on as if it had taken that many inner steps since its last exchange."""
    diloco._local_step = steps


def global_parameters(diloco: Any) -> list[dict[str, Tensor]]:
    """The parameters after the last exchange, by name, for each fragment; they may be written to."""
    return [fragment.original_parameters for fragment in diloco._fragments]


def exchange_now(diloco: Any) -> None:
    """Exchange the next fragment without an inner step before."""
    diloco._local_step = diloco._sync_every - 1
    diloco._step_post_hook(diloco._local_optimizer, (), {})


def gloo_group(store: Any, rank: int, size: int, timeout: timedelta, host: str) -> Any:
    """What torchft's ``ProcessGroupGloo`` connects replicas by, but listening on the network of an address.

    torchft leaves that to Gloo, which takes the address of the machine's own name. ``GLOO_SOCKET_IFNAME`` still wins.
    """
    from torch.distributed import ProcessGroup

    gloo: Any = torch.distributed.ProcessGroupGloo
    options = gloo._Options()
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    options._devices = [gloo.create_device(interface=name) for name in interfaces] or [
        gloo.create_device(hostname=host)
    ]
    options._timeout = timeout
    backend = gloo(store, rank, size, options)
    backend._set_sequence_number_for_group()
    group = ProcessGroup(store, rank, size)
    group._set_default_backend(ProcessGroup.BackendType.GLOO)
    for kind in ("cpu", *(kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available())):
        group._register_backend(torch.device(kind), ProcessGroup.BackendType.GLOO, backend)
    return group


def finished(result: object) -> Any:
    """A ``Work`` that is done, for collectives that wait for themselves."""
    from torchft.work import _DummyWork

    return _DummyWork(result)


def safe_transport(timeout: timedelta, host: str) -> Any:
    """Torchft's ``HTTPTransport``, but what a replica receives from another is read with ``weights_only=True``.

    torchft unpickles whatever the peer sends. Tensors, numbers and texts are all that we send. Others are told to come
    to ``host``, and not to the machine's own name, which they may not know.
    """
    from torch.distributed._serialization import _streaming_load
    from torchft.checkpointing import HTTPTransport

    class SafeTransport(HTTPTransport):
        def metadata(self) -> str:
            return f"http://{host}:{self._server.socket.getsockname()[1]}/checkpoint/"

        @classmethod
        def _load_from_address(cls, address: str, timeout: timedelta) -> object:
            with urllib.request.urlopen(address, timeout=timeout.total_seconds()) as file:  # noqa: S310 (a peer's http)
                return _streaming_load(file, weights_only=True)

    return SafeTransport(timeout, num_chunks=0)
