"""What torchft keeps to itself: how far DiLoCo is between two exchanges, and how changes and checkpoints travel.

A run that stops between two exchanges resumes there only if it knows the inner steps since the last one and the
parameters that it left. ``DiLoCo`` has no state of its own to save.
"""

import urllib.request
from datetime import timedelta
from typing import Any

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


def finished(result: object) -> Any:
    """A ``Work`` that is done, for collectives that wait for themselves."""
    from torchft.work import _DummyWork

    return _DummyWork(result)


def safe_transport(timeout: timedelta) -> Any:
    """Torchft's ``HTTPTransport``, but what a replica receives from another is read with ``weights_only=True``.

    torchft unpickles whatever the peer sends. Tensors, numbers and texts are all that we send.
    """
    from torch.distributed._serialization import _streaming_load
    from torchft.checkpointing import HTTPTransport

    class SafeTransport(HTTPTransport):
        @classmethod
        def _load_from_address(cls, address: str, timeout: timedelta) -> object:
            with urllib.request.urlopen(address, timeout=timeout.total_seconds()) as file:  # noqa: S310 (a peer's http)
                return _streaming_load(file, weights_only=True)

    return SafeTransport(timeout, num_chunks=0)
