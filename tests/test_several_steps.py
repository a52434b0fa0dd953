"""A training whose graphs hold several steps is the training of single steps, file by file. Images
pass for those of a GPU, and graphs are the stand-in's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_step_graph import StandIn
from training import numbers, resume, train, weights

from pygan import checkpoint, training
from pygan.training import Batches, Networks

EVERY = {"log": 12, "save": 18, "sample": 30}
STEPS = 90
FLAGS = (
    f"--steps={STEPS}",
    "--fused",
    "--batch-size=24",
    *(f"--{name}-every={n}" for name, n in EVERY.items()),
)


class Resident:
    """Trainings as on a GPU; ``size`` steps a replay, or None for steps without graphs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.size: int | None = None
        self.known = True  # from an earlier measurement
        self.updates: list[tuple[int, int]] = []
        self.graphs: list[StandIn] = []
        self.after: Callable[[int], None] = lambda step: None
        self.per_epoch = 0
        begin, build, update = Batches.__init__, Networks.__init__, Batches.update

        def begun(batches: Batches, *args: Any) -> None:
            begin(batches, *args)
            batches.resident = True
            self.per_epoch = batches.order.steps_per_epoch

        def built(networks: Networks, *args: Any) -> None:
            build(networks, *args)
            for optimizer in (networks.opt_g, networks.opt_d):
                optimizer.param_groups[0]["capturable"] = True
                optimizer._warned_capturable_if_run_uncaptured = True
            if self.size is not None:
                self.graphs.append(graphs := StandIn(networks.step))
                graphs.times = {self.size: 1.0}
                if self.known:
                    graphs.known = lambda key, candidates: str(self.size)  # type: ignore[method-assign]

        def updated(batches: Batches, networks: Networks, step: int, count: int = 1) -> None:
            self.updates.append((step, count))
            update(batches, networks, step, count)
            self.after(step)

        patch.setattr(Batches, "__init__", begun)
        patch.setattr(Networks, "__init__", built)
        patch.setattr(Batches, "update", updated)


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resident]:
    yield Resident(monkeypatch)


def assert_same_runs(one: Path, other: Path) -> None:
    assert weights(one) == weights(other)
    assert numbers(one) == numbers(other)
    states = [checkpoint.read_state(run / "resume.safetensors") for run in (one, other)]
    for state in states:
        del state["seconds"]
    assert checkpoint.pack_state(states[0]) == checkpoint.pack_state(states[1])
    pictures = sorted(path.name for path in one.glob("*samples*.png"))
    assert pictures and pictures == sorted(path.name for path in other.glob("*samples*.png"))
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in pictures)


def single_and_several(resident: Resident, folder: Path, *flags: str) -> tuple[Path, Path]:
    runs = folder / "single", folder / "several"
    for run, size in zip(runs, (None, 4), strict=True):
        resident.size = size
        resident.updates.clear()
        resident.graphs.clear()
        assert train(*FLAGS, *flags, f"--outf={run}") == 0
    return runs


@pytest.mark.parametrize("flags", [(), ("--flip", "--ema=0.9"), ("--no-monitor",)], ids=str)
def test_several_steps_make_the_run_of_single_ones(
    flags: tuple[str, ...], resident: Resident, tmp_path: Path
) -> None:
    assert_same_runs(*single_and_several(resident, tmp_path, *flags))
    # Every step once, in order.
    assert [s for step, n in resident.updates for s in range(step, step + n)] == list(range(STEPS))
    assert max(n for _, n in resident.updates) == 8
    assert resident.per_epoch < STEPS
    for every in (*EVERY.values(), resident.per_epoch):
        assert all(step // every == (step + n - 1) // every for step, n in resident.updates)
    (graphs,) = resident.graphs
    assert sum(r.done for r in graphs.replays if len(r.out.view(-1, 5)) == 4) >= 12


def test_a_run_finds_out_how_many_steps_a_replay_holds(resident: Resident, tmp_path: Path) -> None:
    resident.known = False
    flags = ("--batch-size=8", "--steps=180", "--log-every=20", "--save-every=100")
    assert_same_runs(*single_and_several(resident, tmp_path, *flags, "--sample-every=180"))
    (graphs,) = resident.graphs
    assert list(graphs.choices.values()) == ["4"]
    alive = [r for r in graphs.replays if not r.closed]
    assert [len(r.out.view(-1, 5)) for r in alive] == [1, 4] and all(r.done for r in alive)


@pytest.mark.parametrize("flag", ["--noise=0.1", "--n-critic=2", "--r1=1"])
def test_what_differs_from_step_to_step_is_one_step(
    flag: str, resident: Resident, tmp_path: Path
) -> None:
    assert_same_runs(*single_and_several(resident, tmp_path, flag))
    assert resident.updates == [(step, 1) for step in range(STEPS)]


def test_a_run_stopped_among_several_steps_goes_on(resident: Resident, tmp_path: Path) -> None:
    whole, _ = single_and_several(resident, tmp_path)
    stopped = tmp_path / "stopped"

    def stop(step: int) -> None:
        if step >= 50:
            os.kill(os.getpid(), signal.SIGTERM)

    resident.after, resident.size = stop, 4
    assert train(*FLAGS, f"--outf={stopped}") == 128 + signal.SIGTERM
    position = checkpoint.read_state(stopped / "resume.safetensors")["position"]
    assert 50 < position < STEPS
    resident.after = lambda step: None
    assert resume(stopped) == 0
    assert_same_runs(whole, stopped)


def test_numbers_that_are_not_finite_send_both_back(
    resident: Resident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate that is too large is halved at the same step, from the same checkpoint."""
    monkeypatch.setattr(training, "ROLLBACKS", 1)
    rows = []
    for size in (None, 4):
        resident.size = size
        run = tmp_path / str(size)
        assert train(*FLAGS, "--lr=1e30", f"--outf={run}") == 1
        rows.append(numbers(run))
    assert rows[0] == rows[1]
    assert any("Rollback 1 of 1" in str(row.get("text")) for row in rows[0])
