"""Layers that are left to torch are torch's own while the module around them is called."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from test_fuse import counted
from torch import Tensor, nn

import pygan
from pygan import pending
from pygan.layers import enter
from pygan.ops import norm_act
from pygan.resting import CALLS
from pygan.sequential import FusedSequential

pytestmark = pytest.mark.native

SMALL, LARGE = 2, 16  # images; the limit lies between the two in both forms


class Network(nn.Module):
    """A norm that is called by itself and two in a Sequential; sees how they are during a call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU()
        self.rest = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
        self.seen: list[tuple[bool, bool]] = []
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(fused(self))
        if self.fails:
            raise RuntimeError("on purpose")
        result: Tensor = self.rest(self.relu(self.norm(x)))
        return result


def fused(network: Network) -> tuple[bool, bool]:
    """Whether the norm has its hook, and whether the Sequential is pygan's."""
    hooks = network.norm._forward_pre_hooks.values()
    return enter in hooks, type(network.rest) is FusedSequential


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    monkeypatch.setattr(pending, "LEAST_ELEMENTS", 4 * 8 * 8 * 4)
    monkeypatch.setattr(pending, "LEAST_NORMED", 4 * 8 * 8 * 3)
    torch.manual_seed(0)
    made = Network()
    pygan.fuse(made)
    return made


def images(batch: int) -> Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(batch))


def settle(network: Network, batch: int) -> None:
    for _ in range(CALLS):
        network(images(batch))
    network.seen.clear()


def test_small_layers_rest_during_a_call_alone(network: Network) -> None:
    settle(network, SMALL)
    assert fused(network) == (True, True)
    network(images(SMALL))
    assert network.seen == [(False, False)]
    assert fused(network) == (True, True)


def test_other_sizes_are_seen_for_themselves(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(network, SMALL)
    settle(network, LARGE)
    for batch, as_fused in ((SMALL, False), (LARGE, True), (SMALL, False)):
        with monkeypatch.context() as patch:
            calls = counted(patch, norm_act, "_run_forward")
            network(images(batch))
        assert bool(calls) == as_fused
        assert network.seen.pop() == (as_fused, as_fused)


def test_numbers_are_those_of_torch(network: Network) -> None:
    plain = copy.deepcopy(network)
    pygan.unfuse(plain)
    for _ in range(2 * CALLS):
        torch.testing.assert_close(network(images(SMALL)), plain(images(SMALL)))
    for found, expected in zip(network.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


def test_groups_are_another_kind_of_call(network: Network) -> None:
    settle(network, SMALL)
    plain = copy.deepcopy(network)
    pygan.unfuse(plain)
    x = images(SMALL)
    with norm_act.batch_groups(2):
        found = network.rest(x)
    torch.testing.assert_close(found, torch.cat([plain.rest(half) for half in x.chunk(2)]))
    with norm_act.batch_groups(2):
        network(x)
    assert network.seen == [(True, True)]


def test_a_layer_called_from_elsewhere_is_fused(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(network, SMALL)
    calls = counted(monkeypatch, norm_act, "_run_forward")
    network.rest(images(LARGE))
    assert calls


def test_after_a_call_that_failed(network: Network) -> None:
    settle(network, SMALL)
    network.fails = True
    with pytest.raises(RuntimeError, match="on purpose"):
        network(images(SMALL))
    network.fails = False
    network(images(LARGE))
    assert network.seen[-1] == (True, True)
    network(images(SMALL))
    assert fused(network) == (True, True)


def test_unfused_after_a_call_that_failed(network: Network) -> None:
    settle(network, SMALL)
    network.fails = True
    with pytest.raises(RuntimeError, match="on purpose"):
        network(images(SMALL))
    pygan.unfuse(network)
    network.fails = False
    network(images(SMALL))
    assert fused(network) == (False, False)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_sees_for_itself(network: Network, again: Any) -> None:
    settle(network, SMALL)
    twin = again(network)
    assert fused(twin) == (True, True)
    twin(images(SMALL))
    assert twin.seen == [(True, True)]
    settle(twin, SMALL)
    twin(images(SMALL))
    assert twin.seen == [(False, False)]
    assert fused(network) == (True, True)


def test_a_hook_of_the_users_keeps_its_place(network: Network) -> None:
    settle(network, SMALL)
    seen: list[type] = []
    network.norm.register_forward_pre_hook(lambda module, args: seen.append(type(args[0])))
    before = list(network.norm._forward_pre_hooks)
    network(images(SMALL))
    assert len(seen) == 1
    assert list(network.norm._forward_pre_hooks) == before


def test_fused_again(network: Network) -> None:
    """What was settled is asked once more: there may be other layers now."""
    settle(network, SMALL)
    pygan.fuse(network)
    network(images(SMALL))
    assert network.seen == [(True, True)]


def hooked(network: Network) -> tuple[bool, bool]:
    """Whether the module itself has its two hooks."""
    return bool(network._forward_pre_hooks), bool(network._forward_hooks)


def test_where_all_rest_the_module_has_no_hooks_either(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(network, SMALL)
    settle(network, LARGE)
    seen: list[tuple[bool, bool]] = []
    call = Network.forward
    monkeypatch.setattr(
        Network, "forward", lambda self, x: (seen.append(hooked(self)), call(self, x))[1]
    )
    for batch in (SMALL, LARGE, SMALL):
        network(images(batch))
        assert hooked(network) == (True, True)
    network.fails = True
    with pytest.raises(RuntimeError, match="on purpose"):
        network(images(SMALL))
    assert seen == [(False, False), (True, True), (False, False), (False, False)]
    assert hooked(network) == fused(network) == (True, True)


def test_others_of_the_class_are_called_as_they_were(network: Network) -> None:
    settle(network, SMALL)
    plain = Network()
    plain.load_state_dict(network.state_dict())
    x = images(LARGE)
    torch.testing.assert_close(plain(x), network(x))
    assert plain.seen == [(False, False)]
    pygan.fuse(plain)
    plain(x)
    assert plain.seen.pop() == (True, True)


def test_hooks_of_the_users_on_the_module_run(network: Network) -> None:
    settle(network, SMALL)
    seen: list[str] = []
    network.register_forward_pre_hook(lambda module, args: seen.append("before"))
    network.register_forward_hook(lambda module, args, output: seen.append(type(output).__name__))
    before = list(network._forward_pre_hooks), list(network._forward_hooks)
    network(images(SMALL))
    assert seen == ["before", "Tensor"]
    assert (list(network._forward_pre_hooks), list(network._forward_hooks)) == before


def test_a_call_that_loses_its_hook_to_another_still_gives_a_plain_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(x))

    monkeypatch.setattr(pending, "LEAST_ELEMENTS", 4 * 8 * 8 * 4)
    given = []
    for call in (Normed._call_impl, Normed.__call__):
        module = Normed()
        pygan.fuse(module)
        for _ in range(CALLS):
            module(images(SMALL))
        module._forward_hooks.clear()  # as a call at rest in another thread does
        given.append(type(call(module, images(LARGE))))
    assert given[0] is not Tensor
    assert given[1] is Tensor


@pytest.mark.parametrize("way", ["compile", "trace"])
def test_recorded_at_rest(network: Network, way: str) -> None:
    network.eval()
    settle(network, SMALL)
    x = images(SMALL)
    expected = network(x)
    if way == "compile":
        recorded = torch.compile(network.requires_grad_(False), backend="eager")
    else:
        recorded = torch.jit.trace(network, x, check_trace=False)
    torch.testing.assert_close(recorded(x), expected)
    assert fused(network) == hooked(network) == (True, True)


@pytest.mark.parametrize(
    "labels", [torch.eye(SMALL).to_sparse(), nn.Parameter(torch.eye(SMALL))], ids=["sparse", "leaf"]
)
def test_other_arguments_are_let_through(labels: Tensor) -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            result: Tensor = self.norm(x) + torch.mm(labels, torch.ones(SMALL, 1)).view(-1, 1, 1, 1)
            return result

    plain = Conditional()
    fused = copy.deepcopy(plain)
    pygan.fuse(fused)
    x = images(SMALL)
    for _ in range(2 * CALLS):
        torch.testing.assert_close(fused(x, labels), plain(x, labels))


def test_threads(network: Network) -> None:
    """Calls of both kinds at once give what one after the other gives."""
    settle(network, SMALL)
    settle(network, LARGE)
    network.eval()
    expected = {batch: network(images(batch)) for batch in (SMALL, LARGE)}
    wrong: list[str] = []

    def work(batch: int) -> None:
        try:
            for _ in range(200):
                torch.testing.assert_close(network(images(batch)), expected[batch])
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(batch,)) for batch in (SMALL, LARGE) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert fused(network) == (True, True)
