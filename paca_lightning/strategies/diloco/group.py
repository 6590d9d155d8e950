"""The connection between replicas: who is in it is checked, and what is sent is counted."""

import hashlib
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, Work  # type: ignore[attr-defined]
from torchft.process_group import ProcessGroupGloo
from typing_extensions import override

from paca_lightning.core.private.torchft import finished, gloo_group
from paca_lightning.strategies.diloco.compression import Compressor


def digest(parts: Iterable[str | Tensor]) -> int:
    """64 bits of SHA-256 over texts and the bytes of tensors, as a signed number that fits in an int64 tensor."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous()
            sha.update(part.flatten().view(torch.uint8).numpy().tobytes())
        else:
            sha.update(part.encode())
    return int.from_bytes(sha.digest()[:8], "little", signed=True)


class ReplicaGroup(ProcessGroupGloo):
    """torchft's group over TCP, which admits only replicas that train the same.

    torchft calls ``configure`` whenever replicas join or leave. Each one then tells what it trains and, if it has
    as many exchanges behind it as another, that both have the same parameters.

    Args:
        identity: What the replica trains, as :func:`digest` has it; the same on all replicas.
        parameters: Digest of the parameters after the last exchange.
        exchanges: The exchanges behind the replica.
        timeout: Of each collective.
        host: Address at which others reach this replica.
        compressor: Makes smaller what is sent. Default: tensors are sent as they are.

    Attributes:
        refusal: Why the replica may not take part; empty if it may.
        sent_bytes: What this replica has sent to others in all-reduces. Gloo's ring sends each byte of a tensor
            2 (n - 1) / n times; what is compressed goes to each of the n - 1 others.
    """

    def __init__(
        self,
        identity: Callable[[], int],
        parameters: Callable[[], int],
        exchanges: Callable[[], int],
        timeout: timedelta,
        host: str,
        compressor: Compressor | None = None,
    ) -> None:
        super().__init__(timeout)
        self._exchanges, self._host, self._within, self._compressor = exchanges, host, timeout, compressor
        self._describe = lambda: [identity(), parameters(), exchanges()]
        self.refusal = ""
        self.sent_bytes = 0

    @override
    def configure(self, *args: Any, **kwargs: Any) -> None:
        """Connect with the replicas of a new quorum.

        Raises:
            RuntimeError: If one of them trains something else. torchft then tries again, without those that stopped.
        """
        super().configure(*args, **kwargs)
        here = torch.tensor(self._describe())
        members = [torch.empty_like(here) for _ in range(self.size())]
        self.allgather([members], [here], AllgatherOptions()).wait()
        self.refusal = refusal(here.tolist(), [member.tolist() for member in members])
        if any(member[0] != members[0][0] for member in members) or self.refusal:
            raise RuntimeError(self.refusal or "a replica that trains something else wants to join")

    @override
    def _create_pg(self, store: Any, rank: int, world_size: int) -> Any:
        return gloo_group(store, rank, world_size, self._within, self._host)

    @override
    def allreduce(self, tensors: list[Tensor], opts: object) -> Work:
        """Add tensors up over the replicas, in place, so that all have the same bits.

        With compression, each tensor is the flat change of one fragment. All replicas gather the same payloads and add
        them up in the same order. A reduced sum would have to be compressed once more.
        """
        others = self.size() - 1
        if self._compressor is None:
            self.sent_bytes += sum(2 * tensor.nbytes * others // (others + 1) for tensor in tensors)
            return super().allreduce(tensors, opts)
        for tensor in tensors:
            payload = self._compressor.pack(tensor.cpu(), self._exchanges())
            payloads = [torch.empty_like(payload) for _ in range(self.size())]
            self.allgather([payloads], [payload], AllgatherOptions()).wait()
            self.sent_bytes += payload.nbytes * others
            tensor.copy_(self._compressor.total(payloads, tensor.numel()))
        return finished(tensors)


def refusal(here: list[int], members: list[list[int]]) -> str:
    """Why a replica has to stop; empty if it may go on.

    Among replicas that differ, most are right, or else those with the most exchanges behind them.

    Args:
        here: This replica's identity, digest of parameters, and number of exchanges.
        members: The same of all replicas, this one included.
    """
    identity, parameters, exchanges = here
    weight = {member[0]: 0 for member in members}
    for member in members:
        weight[member[0]] += 1
    rank = {other: (count, max(m[2] for m in members if m[0] == other)) for other, count in weight.items()}
    if any(other != identity and rank[other] >= rank[identity] for other in rank):
        return (
            "this replica and others do not train the same: the names and shapes of trained parameters, the columns "
            "(selection and seed), or sync_every, fragments, compression and the outer optimizer differ. Start all "
            "replicas with one config and one seed."
        )
    if any(member[0] == identity and member[2] == exchanges and member[1] != parameters for member in members):
        return (
            f"this replica and others have different parameters after {exchanges} exchanges. Start all with the same "
            "seed, base model and adapter, or resume all from checkpoints of one run."
        )
    return ""
