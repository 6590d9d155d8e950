"""Compressed exchanges: equal to plain references, the same bits on all replicas, resumed and failed ones."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paca_lightning import PaCAError
from tests.processes import HANG

pytest.importorskip("torchft")

from paca_lightning.strategies.diloco.compression import BLOCK, BFloat16, Compressor, Int8, TopK, compressor
from paca_lightning.strategies.diloco.outer import OuterLoop
from paca_lightning.strategies.diloco.settings import Outer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning"),  # torchft's logger
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),  # torch, of what a late replica receives
]

SHAPES = [(7, 40), (33,), (5, 61)]  # no multiple of a block
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)
SHARE = 0.05


def plain_int8(change: np.ndarray) -> tuple[np.ndarray, int]:
    """What arrives of a change, and its bytes, by a loop over blocks."""
    arrives = np.zeros_like(change)
    for start in range(0, len(change), BLOCK):
        block = change[start : start + BLOCK]
        scale = np.abs(block).max() / np.float32(127)
        arrives[start : start + BLOCK] = np.rint(block / scale) * scale if scale else 0
    return arrives, len(change) + 4 * -(-len(change) // BLOCK)


def plain_top_k(change: np.ndarray) -> tuple[np.ndarray, int]:
    arrives = np.zeros_like(change)
    largest = sorted(range(len(change)), key=lambda place: -abs(change[place]))[: int(len(change) * SHARE)]
    for place in largest:
        arrives[place] = torch.tensor(change[place]).bfloat16().item()
    return arrives, 6 * len(largest)


def plain_bf16(change: np.ndarray) -> tuple[np.ndarray, int]:
    return torch.from_numpy(change).bfloat16().float().numpy(), 2 * len(change)


PLAIN: dict[str, Callable[[np.ndarray], tuple[np.ndarray, int]]] = {
    "bf16": plain_bf16,
    "int8": plain_int8,
    "top_k": plain_top_k,
}


class Alone:
    """A run around an outer loop that ends at no step."""

    def __init__(self, last: int = -1) -> None:
        self.step, self.last = 0, last

    def identity(self) -> list[str | Tensor]:
        return ["same"]

    def position(self) -> dict[str, Any]:
        return {"step": self.step}

    def take_position(self, position: dict[str, Any]) -> None:
        self.step = position["step"]

    def at_last_step(self) -> bool:
        return self.step == self.last

    def exchanged(self, loop: OuterLoop) -> None:
        assert not loop.failed


def moves(number: int, steps: int) -> list[list[Tensor]]:
    """The gradients of a replica's inner steps."""
    generator = torch.Generator().manual_seed(number)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(steps)]


def one_replica(
    number: int,
    lighthouse: str,
    settings: Outer,
    steps: range,
    state: dict[str, Any] | None = None,
    start: list[Tensor] | None = None,
    last: int = -1,
) -> tuple[list[Tensor], dict[str, Any], int]:
    """Take steps of plain SGD as one replica: its parameters, the loop's state, and the bytes that it sent."""
    parameters = [nn.Parameter(value.clone()) for value in start or [torch.zeros(shape) for shape in SHAPES]]
    optimizer, run = torch.optim.SGD(parameters, lr=1.0), Alone(last)
    timeout = timedelta(seconds=HANG)
    loop = OuterLoop(
        optimizer,
        settings,
        run,
        replica=number,
        lighthouse=lighthouse,
        host="127.0.0.1",
        min_replicas=2,
        timeout=timeout,
    )
    try:
        if state is not None:
            loop.load_state_dict(state)
        for run.step in steps:
            for parameter, move in zip(parameters, moves(number, run.step + 1)[-1], strict=True):
                parameter.grad = move
            optimizer.step()
        return [parameter.detach().clone() for parameter in parameters], loop.state_dict(), loop.group.sent_bytes
    finally:
        loop.close()


def together(count: int, *arguments: Any, **settings: list[Any]) -> list[Any]:
    """Replicas in threads of this process, which exchange over TCP."""
    with ThreadPoolExecutor(count) as pool:
        waiting = [
            pool.submit(one_replica, number, *arguments, **{name: values[number] for name, values in settings.items()})
            for number in range(count)
        ]
        return [each.result(HANG) for each in waiting]


def both(*arguments: Any, **settings: list[Any]) -> list[Any]:
    """Two of them."""
    return together(2, *arguments, **settings)


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def plain_run(name: str, exchanges: int) -> tuple[np.ndarray, int]:
    """Error feedback and Nesterov's outer step as loops over numpy arrays; one inner step before each exchange."""
    at, momentum = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32)
    owed, sent = [np.zeros(SIZE, np.float32) for _ in range(2)], 0
    for exchange in range(exchanges):
        total = np.zeros(SIZE, np.float32)
        for number in range(2):
            move = np.concatenate([move.numpy().ravel() for move in moves(number, exchange + 1)[-1]])
            change = at - (at - move)
            if name != "bf16":
                change = change + owed[number]
            arrives, sent_now = PLAIN[name](change)
            owed[number] = change - arrives
            total += arrives
        sent += sent_now
        mean = total / np.float32(2)
        momentum = np.float32(0.9) * momentum + mean if exchange else mean
        at = at - np.float32(0.7) * (mean + np.float32(0.9) * momentum)
    return at, sent


@pytest.mark.parametrize("name", PLAIN)
def test_five_exchanges_equal_a_plain_loop_of_error_feedback(name: str, lighthouse: Callable[[int], str]) -> None:
    settings = Outer(sync_every=1, compression=name, top_k=SHARE)  # type: ignore[arg-type]
    (first, _, sent), (second, _, _) = both(lighthouse(2), settings, range(5))
    assert same_bits(first, second)
    expected, expected_bytes = plain_run(name, 5)
    assert sent == expected_bytes
    # torch's SGD fuses a product and a sum; a wrong residual differs by 1e-2 and more
    np.testing.assert_allclose(torch.cat([part.flatten() for part in first]).numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "fragments"), [("top_k", 1), ("int8", 2), ("none", 3)])
def test_run_resumes_bitwise_between_two_exchanges(name: str, fragments: int, lighthouse: Callable[[int], str]) -> None:
    """Exchanges of 1, 2 or 3 fragments every six steps; the state is taken behind step 8 of 13."""
    settings = Outer(sync_every=6, compression=name, top_k=SHARE, fragments=fragments)  # type: ignore[arg-type]
    last = {"last": [12, 12]}
    whole = both(lighthouse(2), settings, range(13), **last)
    assert same_bits(whole[0][0], whole[1][0])  # of all fragments: the last step exchanges each
    half = both(lighthouse(2), settings, range(8))
    assert not same_bits(half[0][0], half[1][0])  # between two exchanges
    states, starts = [[replica[part] for replica in half] for part in (1, 0)]
    resumed = both(lighthouse(2), settings, range(8, 13), state=states, start=starts, **last)
    for before, after in zip(whole, resumed, strict=True):
        assert same_bits(before[0], after[0])
        assert same_bits(before[1]["residuals"], after[1]["residuals"])
        assert before[2] == after[2] > 0


def test_returning_replica_owes_nothing(lighthouse: Callable[[int], str]) -> None:
    settings = Outer(sync_every=2, compression="top_k", top_k=SHARE)
    address = lighthouse(2)
    _, (at, state, _) = both(address, settings, range(2))
    assert state["residuals"][0].abs().max() > 0
    # The first goes on from its state, the second comes anew and takes over the first's parameters.
    (first, _, _), (second, after, _) = both(
        lighthouse(2), settings, range(2, 4), state=[state, None], start=[at, None]
    )
    assert same_bits(first, second)
    # It took over the first's parameters, so the first's change; with nothing owed, it kept what top_k left of that.
    owed = after["residuals"][0]
    change = sum(torch.cat([move.flatten() for move in moves(0, 4)[step]]) for step in (2, 3))
    assert torch.isclose(owed, change, atol=1e-5).sum() == SIZE - int(SIZE * SHARE)


def test_replica_that_returns_for_the_last_exchanges_of_fragments_ends_with_the_same_bits(
    lighthouse: Callable[[int], str],
) -> None:
    settings = Outer(sync_every=4, fragments=2, compression="int8")
    _, (at, state, _) = both(lighthouse(2), settings, range(2))
    anew = {"state": [state, None], "start": [at, None], "last": [3, 3]}
    (first, before, _), (second, after, _) = both(lighthouse(2), settings, range(2, 4), **anew)
    assert same_bits(first, second)
    assert before["manager"] == after["manager"]
    assert before["manager"]["step"] == 3  # one before, and the last one of each fragment


def test_failed_exchange_leaves_what_was_owed_before() -> None:
    changes = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    steady, failing = Compressor(TopK(0.1), [100]), Compressor(TopK(0.1), [100])
    for compressor_ in (steady, failing):
        compressor_.pack(changes[0], 0)
        compressor_.settle(done=True)
    failing.pack(changes[1], 1)
    failing.settle(done=False)
    assert torch.equal(failing.pack(changes[2], 1), steady.pack(changes[2], 1))
    failing.settle(done=True)
    failing.clear()
    assert not failing.residuals[0].any()


@pytest.mark.parametrize("code", [BFloat16(), Int8(), TopK(0.1)])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_broken_values_arrive_as_such(code: Any, broken: float) -> None:
    change = torch.linspace(-1, 1, 300)
    change[7] = broken
    arrives = code.unpack(code.pack(change), 300)
    assert not arrives[7].isfinite()
    assert arrives[BLOCK:].isfinite().all()


def test_int8_of_zeros_and_of_the_smallest_numbers() -> None:
    tiny = torch.tensor([0.0, 180.0, -90.0]) * 2**-149
    for change in (torch.zeros(300), tiny):
        arrives = Int8().unpack(Int8().pack(change), len(change))
        assert (arrives - change).abs().max() <= change.abs().max() / 2
        assert (arrives * change >= 0).all()


def test_top_k_sends_one_value_at_least() -> None:
    code = TopK(0.001)
    assert code.unpack(code.pack(torch.tensor([1.0, -3.0, 2.0])), 3).tolist() == [0.0, -3.0, 0.0]


def test_parameters_of_several_dtypes_are_refused() -> None:
    parts = [nn.ParameterList([torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)])]
    with pytest.raises(PaCAError, match=r"torch.bfloat16, torch.float32"):
        compressor(parts, Outer(compression="int8"))
    assert compressor(parts, Outer()) is None


def test_more_values_than_top_k_can_count_are_refused() -> None:
    parts = [nn.ParameterList([torch.empty(2**31, device="meta")])]
    with pytest.raises(PaCAError, match="Set fragments"):
        compressor(parts, Outer(compression="top_k"))


def test_two_replicas_of_different_settings_both_stop(lighthouse: Callable[[int], str]) -> None:
    """Nobody knows which of two is right."""
    different = [Outer(sync_every=1), Outer(sync_every=1, lr=0.5)]
    with ThreadPoolExecutor(2) as pool:
        address = lighthouse(2)
        waiting = [pool.submit(one_replica, number, address, different[number], range(1)) for number in range(2)]
        for each in waiting:
            with pytest.raises(PaCAError, match="this replica and others do not train the same"):
                each.result(HANG)


def test_state_of_another_compression_is_refused(lighthouse: Callable[[int], str]) -> None:
    address = lighthouse(2)
    _, (_, state, _) = both(address, Outer(sync_every=1), range(1))
    with pytest.raises(PaCAError, match="another compression than 'int8'"):
        one_replica(0, lighthouse(2), Outer(sync_every=1, compression="int8"), range(0), state)
