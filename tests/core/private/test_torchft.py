"""Canaries for the private APIs of torchft."""

import pickle
import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.core.private.canary import canary, check_coverage

pytest.importorskip("torchft")

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torchft.local_sgd import DiLoCo

from paca_lightning.core.private import torchft as private


def diloco(parameter: nn.Parameter, **manages: Any) -> DiLoCo:
    """Behind a manager that never exchanges, unless it is given how."""
    manager = SimpleNamespace(
        _use_async_quorum=False,
        register_state_dict_fn=lambda *_: None,
        allow_state_dict_read=lambda: None,
        disallow_state_dict_read=lambda: None,
        **manages,
    )
    inner = torch.optim.SGD([parameter], lr=1.0)
    return DiLoCo(manager, [nn.ParameterList([parameter])], inner, torch.optim.SGD([parameter], lr=1.0), sync_every=9)


@canary("torchft.inner_steps", "torchft.set_inner_steps")
def test_inner_steps() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    with diloco(parameter) as loop:
        loop._local_optimizer.step()
        assert private.inner_steps(loop) == 1
        private.set_inner_steps(loop, 4)
        loop._local_optimizer.step()
        assert private.inner_steps(loop) == 5


@canary("torchft.global_parameters")
def test_global_parameters() -> None:
    parameter = nn.Parameter(torch.ones(2))
    loop = diloco(parameter)
    parameter.data.fill_(3)
    (part,) = private.global_parameters(loop)
    assert [saved.tolist() for saved in part.values()] == [[1.0, 1.0]]


@canary("torchft.exchange_now")
def test_exchange_now() -> None:
    parameter = nn.Parameter(torch.ones(2))
    exchanges = {"allreduce": lambda tensor, **_: private.finished(tensor), "should_commit": lambda: True}
    loop = diloco(parameter, **exchanges, start_quorum=lambda: None, current_step=lambda: 0)
    parameter.data.fill_(3)
    private.exchange_now(loop)
    assert private.inner_steps(loop) == 0
    assert parameter.tolist() == [3.0, 3.0]  # a step of 1 by what the parameter moved


@canary("torchft.finished")
def test_finished() -> None:
    work = private.finished([torch.ones(2)])
    assert work.wait()
    assert work.get_future().then(lambda done: done.value()[0] * 2).wait().tolist() == [2.0, 2.0]


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this ran",)


@canary("torchft.safe_transport")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch, of a stream
@pytest.mark.parametrize("hostile", [False, True])
def test_safe_transport(hostile: bool, capfd: pytest.CaptureFixture[str]) -> None:
    transport = private.safe_transport(timedelta(seconds=60), "127.0.0.1")
    try:
        sent = {"parameters": [torch.arange(3.0)], "steps": 4, "hostile": Hostile() if hostile else None}
        sending = threading.Thread(target=transport.send_checkpoint, args=([1], 7, sent, timedelta(seconds=60)))
        sending.start()
        sending.join()
        address = transport.metadata()
        if hostile:
            with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):
                transport.recv_checkpoint(0, address, 7, timedelta(seconds=60))
            assert "this ran" not in capfd.readouterr().out
        else:
            received = transport.recv_checkpoint(0, address, 7, timedelta(seconds=60))
            assert received["steps"] == 4
            assert torch.equal(received["parameters"][0], torch.arange(3.0))
    finally:
        transport.shutdown()
        transport._server.server_close()


@canary("torchft.gloo_group")
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_gloo_group(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas meet at the address that each is given, whatever the machine's name means."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("socket.gethostname", lambda: "nowhere.invalid")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = {}

    def meet(rank: int) -> None:
        own = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
        group = private.gloo_group(own, rank, 2, timedelta(seconds=60), host)
        values = torch.full((3,), rank + 1.0)
        group.allreduce([values]).wait()
        found[rank] = values.tolist()

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [3.0, 3.0, 3.0], 1: [3.0, 3.0, 3.0]}


def test_every_function_has_a_canary() -> None:
    check_coverage("torchft")
