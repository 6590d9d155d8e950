"""Replicas that train in turns on one model, in one process, with the bits of replicas that exchange over TCP.

More than two without compression have them to rounding: Gloo's ring adds their changes up in another order.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paca_lightning.strategies.diloco.compression import compressor
from paca_lightning.strategies.diloco.settings import Outer


class Cluster:
    """Replicas of one training, in turns on one model.

    Args:
        parameters: What is trained.
        gradients: Fills their ``grad``, for a replica and a step.
        optimizer: Makes an inner optimizer, with its schedule.
        replicas: How many there are.
        loaded: Called when parameters were written by other means than a step.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        gradients: Callable[[int, int], None],
        optimizer: Callable[[], tuple[torch.optim.Optimizer, Any]],
        replicas: int,
        loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.parameters, self._gradients, self._optimizer = parameters, gradients, optimizer
        self.replicas, self._loaded = replicas, loaded
        self._start = [parameter.detach().clone() for parameter in parameters]
        self._first: dict[tuple[int, int], tuple[Tensor, Any]] = {}  # rounds, the same for all compressions

    def ddp(self, steps: int) -> Iterator[tuple[int, int]]:
        """Train by the mean of all gradients: the number of steps behind, and bytes sent by each replica."""
        self._load(self._start)
        (optimizer, schedule), sent = self._optimizer(), 0
        for step in range(steps):
            total = torch.zeros(sum(parameter.numel() for parameter in self.parameters))
            for replica in range(self.replicas):
                self._gradients(replica, step)
                total += flat(parameter.grad for parameter in self.parameters)
            self._give(total / self.replicas, self.parameters)
            optimizer.step()
            schedule.step()
            sent += ring_bytes(4 * len(total), self.replicas)
            yield step + 1, sent

    def diloco(self, outer: Outer, steps: int) -> Iterator[tuple[int, int]]:
        """Train as ``paca_diloco`` does: the number of steps behind each exchange, and bytes sent by each replica."""
        shared = [nn.Parameter(value.clone()) for value in self._start]
        optimizers = [self._optimizer() for _ in range(self.replicas)]
        codes = [compressor([nn.ParameterList(shared)], outer) for _ in range(self.replicas)]
        nesterov, sent = outer.optimizer(shared), 0
        for exchange, start in enumerate(range(0, steps, outer.sync_every)):
            end = min(start + outer.sync_every, steps)
            changes = [self._round(n, start, end, shared, optimizers[n]) for n in range(self.replicas)]
            if codes[0] is None:
                total, size = torch.stack(changes).sum(0), 0
                sent += ring_bytes(changes[0].nbytes, self.replicas)
            else:
                payloads = [code.pack(change, exchange) for code, change in zip(codes, changes, strict=True) if code]
                total, size = codes[0].total(payloads, len(changes[0])), payloads[0].nbytes
                for code in codes:
                    assert code is not None
                    code.settle(done=True)
            sent += size * (self.replicas - 1)
            self._give(total / self.replicas, shared)
            nesterov.step()
            self._load(shared)
            yield end, sent

    def _round(self, replica: int, start: int, end: int, shared: list[nn.Parameter], inner: tuple[Any, Any]) -> Tensor:
        """A replica's steps between two exchanges: how far it moved, negative as a gradient is."""
        if start == 0 and (replica, end) in self._first:
            change, states = self._first[replica, end]
            for part, state in zip(inner, states, strict=True):
                part.load_state_dict(copy.deepcopy(state))
            return change
        self._load(shared)
        for step in range(start, end):
            self._gradients(replica, step)
            for part in inner:
                part.step()
        change = flat(at.detach() - moved.detach() for at, moved in zip(shared, self.parameters, strict=True))
        if start == 0:
            self._first[replica, end] = change, [copy.deepcopy(part.state_dict()) for part in inner]
        return change

    def _load(self, values: list[Any]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)
        self._loaded()

    @staticmethod
    def _give(gradient: Tensor, parameters: list[nn.Parameter]) -> None:
        for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()


def flat(tensors: Any) -> Tensor:
    """Tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def ring_bytes(payload: int, replicas: int) -> int:
    """What each replica sends to all-reduce so many bytes."""
    return 2 * payload * (replicas - 1) // replicas
