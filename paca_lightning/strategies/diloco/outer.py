"""DiLoCo's outer loop: what happens to the trained parameters every few optimizer steps."""

from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torchft import (
    exchange_now,
    global_parameters,
    inner_steps,
    safe_transport,
    set_inner_steps,
)
from paca_lightning.strategies.diloco.address import own_address
from paca_lightning.strategies.diloco.compression import compressor
from paca_lightning.strategies.diloco.fragments import split
from paca_lightning.strategies.diloco.group import ReplicaGroup, digest
from paca_lightning.strategies.diloco.settings import Outer

CONNECT_TIMEOUT = timedelta(seconds=20)
QUORUM_TIMEOUT = timedelta(hours=1)  # others may be an hour of inner steps away from their exchange

NO_LIGHTHOUSE = (
    "no lighthouse answers at {lighthouse} ({error}). Start one, `torchft_lighthouse --min_replicas 1 "
    "--bind 0.0.0.0:29510`, and set the strategy's lighthouse to http://HOST:29510."
)


class Run(Protocol):
    """What the outer loop asks of the run around it."""

    def identity(self) -> list[str | Tensor]:
        """What is trained, beside the settings: equal on all replicas, or they may not exchange anything."""

    def position(self) -> dict[str, Any]:
        """How far the run is: plain values and tensors, which a late replica takes over from another."""

    def take_position(self, position: dict[str, Any]) -> None:
        """Go on where another replica is."""

    def at_last_step(self) -> bool:
        """Whether the optimizer step that is being taken is the run's last."""

    def exchanged(self, loop: "OuterLoop") -> None:
        """Called after each exchange, done or failed."""


class OuterLoop:
    """Exchanges trained parameters with other replicas behind an optimizer's steps.

    Its hooks run behind those steps, in the order in which they are registered: what writes trained columns into
    weights has to be registered later.

    Args:
        optimizer: The inner optimizer.
        settings: Of the outer loop.
        run: The run around it.
        replica: Number of this replica.
        lighthouse: Address of torchft's lighthouse.
        host: Name or address at which other replicas reach this one. Default: :func:`own_address`.
        min_replicas: Fewer than these exchange nothing.
        timeout: Of an exchange.

    Attributes:
        failed: Exchanges that failed one after the other, until now.
        host: Where others reach this replica.

    Raises:
        PaCAError: If no lighthouse answers or is found, or parameters of several dtypes are to be compressed.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        settings: Outer,
        run: Run,
        *,
        replica: int,
        lighthouse: str,
        host: str | None = None,
        min_replicas: int = 1,
        timeout: timedelta = timedelta(seconds=60),
    ) -> None:
        self._inner, self._settings, self._run = optimizer, settings, run
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        parts = [nn.ParameterList(part) for part in split(self._parameters, settings.fragments)]
        self._compressor = compressor(parts, settings)
        self.host = host = host or own_address(lighthouse)
        self.group = ReplicaGroup(self._identity, self._digest, lambda: self.exchanges, timeout, host, self._compressor)
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        try:
            self._manager = Manager(
                self.group,
                load_state_dict=self._take,
                state_dict=self._give,
                min_replica_size=min_replicas,
                use_async_quorum=False,
                timeout=timeout,
                quorum_timeout=QUORUM_TIMEOUT,
                connect_timeout=CONNECT_TIMEOUT,
                rank=0,
                world_size=1,
                store_addr=host,
                store_port=self._store.port,
                lighthouse_addr=lighthouse,
                replica_id=f"replica_{replica}",
                hostname=host,
                checkpoint_transport=safe_transport(timeout, host),
                init_sync=False,
            )
        except (RuntimeError, TimeoutError) as error:
            raise PaCAError(NO_LIGHTHOUSE.format(lighthouse=lighthouse, error=error)) from error
        self._outers = [settings.optimizer(part) for part in parts]
        mib = sum(parameter.nbytes for parameter in self._parameters) // 2**20 + 1
        self._diloco = DiLoCo(
            self._manager,
            parts,
            optimizer,
            self._outers,
            settings.sync_every,
            use_bucketization=self._compressor is not None,  # a fragment as one vector
            bucket_cap_mb=mib,
        )
        self.failed = 0
        self._exchanges_before, self._gradients = 0, list[Tensor | None]()
        self._last: int | None = None  # exchanges behind the replica when the run is over, once that is known
        self._handles = [optimizer.register_step_post_hook(self._before_exchange)]
        self._diloco.__enter__()
        self._handles.append(optimizer.register_step_post_hook(self._after_exchange))

    @property
    def exchanges(self) -> int:
        """Exchanges behind this replica; each is of one fragment."""
        return int(self._manager.current_step())

    @property
    def replicas(self) -> int:
        """Replicas that took part in the last exchange."""
        return int(self._manager.num_participants())

    def state_dict(self) -> dict[str, Any]:
        """The outer optimizer, the parameters after the last exchange, how far the next one is, and what it owes."""
        return {
            "manager": self._manager.state_dict(),
            "inner_steps": inner_steps(self._diloco),
            "outer": [outer.state_dict() for outer in self._outers],
            "parameters": [{n: p.clone() for n, p in part.items()} for part in global_parameters(self._diloco)],
            "residuals": [residual.clone() for residual in self._residuals],
            "sent_bytes": self.group.sent_bytes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            PaCAError: If what is still to be sent does not fit, as another compression was used.
        """
        if [len(residual) for residual in state["residuals"]] != [len(residual) for residual in self._residuals]:
            raise PaCAError(
                f"the checkpoint was written with another compression than {self._settings.compression!r}, or other "
                "fragments: what it has still to send does not fit. Resume with the settings of the run that wrote it."
            )
        for residual, saved in zip(self._residuals, state["residuals"], strict=True):
            residual.copy_(saved)
        self.group.sent_bytes = state["sent_bytes"]
        self._manager.load_state_dict(state["manager"])
        set_inner_steps(self._diloco, state["inner_steps"])
        for outer, saved in zip(self._outers, state["outer"], strict=True):
            outer.load_state_dict(saved)
        for part, saved in zip(global_parameters(self._diloco), state["parameters"], strict=True):
            for name, parameter in part.items():
                parameter.copy_(saved[name])

    def close(self) -> None:
        """Leave the group: others exchange without this replica from now on."""
        self._diloco.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        self._manager.shutdown(wait=False)
        self.group.shutdown()

    @property
    def _residuals(self) -> list[Tensor]:
        return [] if self._compressor is None else self._compressor.residuals

    def _before_exchange(self, *_: Any) -> None:
        """Keep what the exchange overwrites, and let the last step end with one."""
        self._exchanges_before = self.exchanges
        self._gradients = [parameter.grad for parameter in self._parameters]
        if self._run.at_last_step():
            self._last = self.exchanges + self._settings.fragments
            set_inner_steps(self._diloco, self._settings.sync_every // self._settings.fragments - 1)

    def _after_exchange(self, *_: Any) -> None:
        """Stop what may not take part, and give the parameters the gradients of the inner step back."""
        if inner_steps(self._diloco) == 0:
            self._settle()
            for _attempt in range(2 * self._settings.fragments):
                if self._last is None or self.exchanges >= self._last or self._settings.fragments == 1:
                    break
                self._exchanges_before = self.exchanges
                exchange_now(self._diloco)
                self._settle()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._gradients = []

    def _settle(self) -> None:
        """Draw the conclusions of an exchange, done or failed."""
        if self.group.refusal:
            raise PaCAError(self.group.refusal)
        done = self.exchanges > self._exchanges_before
        self.failed = 0 if done else self.failed + 1
        if self._compressor is not None:
            self._compressor.settle(done)
        self._run.exchanged(self)

    def _identity(self) -> int:
        shapes = [f"{tuple(parameter.shape)} {parameter.dtype}" for parameter in self._parameters]
        return digest([str(self._settings), *shapes, *self._run.identity()])

    def _digest(self) -> int:
        return digest(parameter for part in global_parameters(self._diloco) for parameter in part.values())

    def _give(self) -> dict[str, Any]:
        """What a late replica takes from this one; copies, as this one goes on while they travel."""
        return {
            "parameters": [parameter.detach().clone() for parameter in self._parameters],
            "optimizer": self._inner.state_dict(),
            "position": self._run.position(),
            "last": self._last,
        }

    def _take(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for parameter, theirs in zip(self._parameters, state["parameters"], strict=True):
                parameter.copy_(theirs)
        self._inner.load_state_dict(state["optimizer"])
        self._run.take_position(state["position"])
        self._last = state["last"]
        if self._compressor is not None:
            self._compressor.clear()  # what was still to be sent is lost, or belongs to the replica that sent this
