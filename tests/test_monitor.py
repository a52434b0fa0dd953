"""Training broken on purpose: every fault is named, and healthy training gets no finding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diagnosis
import pytest
import torch
from diagnosis import CASES, FOOTWEAR, HEALTHY_SEEDS, Case, diagnose
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from training import resume, train

import pygan
from pygan import Finding, Monitor, checkpoint, data
from pygan.config import Config
from pygan.data.builtin import fashion_mnist
from pygan.models import dcgan
from pygan.monitor import FAULTS, AutoFix, Variety, nonfinite
from pygan.monitor.variety import SIGNALS
from pygan.training import Batches, Networks, Training

NZ = 8


@pytest.fixture(scope="module")
def real() -> Tensor:
    """Fashion-MNIST at 16 pixels, float in [-1, 1]."""
    images = data.load("fashion-mnist", image_size=16).images[::10]
    return torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1


def _shoes(real: Tensor) -> Tensor:
    """Three classes out of ten, none of the first 500 images."""
    labels = torch.tensor(fashion_mnist()[1][::10])[500:]
    return real[500:][torch.isin(labels, torch.tensor(FOOTWEAR))]


class Fixed(nn.Module):
    """A generator that shows given images: its latents say which."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("images", images)

    def forward(self, z: Tensor) -> Tensor:
        which = (z.flatten(1).sum(1).abs() * 1e4).long() % len(self.images)
        return self.images[which] * self.weight


def _watched(
    signals: Callable[[int], tuple[float, float, float, float]],
    steps: int = 900,
    monitor: Monitor | None = None,
) -> list[Finding]:
    if monitor is None:
        monitor = Monitor(*dcgan(16, 1, NZ, 8, 8))
    found = []
    for step in range(1, steps + 1):
        monitor.update(*(torch.tensor(value) for value in signals(step)))
        if step % 20 == 0:
            found += monitor.check(step)
    return found


def _fine(step: int) -> tuple[float, float, float, float]:
    return 0.5 + 0.01 * (step % 7), 2.0 + 0.01 * (step % 11), 0.8, 0.2


def _codes(found: list[Finding]) -> list[str]:
    return [f"{finding.code}{' over' if finding.over else ''}" for finding in found]


@pytest.mark.parametrize(
    ("code", "signals"),
    [
        ("d_overpowers", (0.001, 8.0, 0.999, 0.001)),
        ("d_fooled", (1.9, 0.1, 0.5, 0.9)),
    ],
)
def test_a_fault_of_the_losses_is_found_once_and_its_end_too(
    code: str, signals: tuple[float, float, float, float]
) -> None:
    def broken(step: int) -> tuple[float, float, float, float]:
        if not 300 < step <= 600:
            return _fine(step)
        return tuple(value * (1 + 0.001 * (step % 13)) for value in signals)  # type: ignore[return-value]

    found = _watched(broken)
    assert _codes(found) == [code, f"{code} over"]
    begin, end = found
    assert (begin.step, end.step) == (420, 660)
    assert begin.values["loss_d"] == pytest.approx(signals[0], rel=0.02)
    assert (begin.severity, end.severity) == ("warning", "note")
    assert FAULTS[code].advice in str(begin)
    assert "arXiv" in str(begin)


def test_a_short_spell_of_a_fault_is_none() -> None:
    assert _watched(lambda i: (0.001, 8.0, 1.0, 0.0) if 400 < i <= 480 else _fine(i)) == []


def test_losses_that_do_not_move_are_frozen_even_at_first() -> None:
    found = _watched(lambda _: (4.5e-5, 10.0, 1.0, 0.0), steps=200)
    assert _codes(found) == ["frozen"]


def _with_gradients(scale: float) -> Monitor:
    G, D = dcgan(16, 1, NZ, 8, 8)
    for parameter in (*G.parameters(), *D.parameters()):
        parameter.grad = torch.full_like(parameter, 1e-3)
    G.main[3].weight.grad.mul_(scale)  # type: ignore[union-attr, operator]
    return Monitor(G, D)


def test_exploding_gradients_name_the_worst_layer() -> None:
    (found,) = _watched(_fine, monitor=_with_gradients(1e5))
    assert found.code == "exploding"
    assert "main.3.weight of G" in found.where
    assert found.values["grad_g"] > 100


def test_vanishing_gradients_are_found() -> None:
    G, D = dcgan(16, 1, NZ, 8, 8)
    for parameter in G.parameters():
        parameter.grad = torch.full_like(parameter, 1e-12)
    (found,) = _watched(_fine, monitor=Monitor(G, D))
    assert (found.code, found.where) == ("vanishing", "in G")


def test_usual_gradients_are_none() -> None:
    assert _watched(_fine, monitor=_with_gradients(1.0)) == []


@pytest.mark.parametrize(
    ("code", "images"),
    [
        ("mode_collapse", lambda real: real[:1]),
        ("mode_collapse", lambda real: real[:6] + 0.001),
        ("partial_collapse", _shoes),
        ("copies", lambda real: real[:500]),
        (None, lambda real: real[500:]),
    ],
)
def test_variety(code: str | None, images: Callable[[Tensor], Tensor], real: Tensor) -> None:
    z = torch.randn(64, NZ, 1, 1)
    D = dcgan(16, 1, NZ, 8, 8)[1]
    monitor = Monitor(Fixed(images(real)), D, real=real[:500], fixed_z=z)
    found = _watched(_fine, monitor=monitor)
    # One of the images that a collapsed G shows may well be near to one of the data.
    seen = [f.code for f in found if f.code != "copies" or code == "copies"]
    assert seen == ([code] if code else [])


@pytest.mark.parametrize("noise", [0.0, 0.5], ids=["alike", "varied"])
def test_samples_that_stay_far_until_they_come_near(real: Tensor, noise: float) -> None:
    torch.manual_seed(0)
    far = (0.5 * torch.ones(200, 1, 16, 16) + noise * torch.randn(200, 1, 16, 16)).clamp(-1, 1)
    G, D = Fixed(far), dcgan(16, 1, NZ, 8, 8)[1]
    first = Monitor(G, D, real=real[:500], nz=NZ)
    codes = []
    for step in range(20, 1400, 20):
        if step == 700:
            G.images = real[500:]
            second = Monitor(G, D, real=real[:500], nz=NZ)
            second.load_state_dict(first.state_dict())
        codes += _codes((first if step < 700 else second).check(step, _fine(step)))
    assert codes == ["stalled", "stalled over"]


def test_samples_that_come_nearer_do_not_stand_still(real: Tensor) -> None:
    torch.manual_seed(0)
    far = torch.randn(len(real) - 500, 1, 16, 16).clamp(-1, 1)
    G, D = Fixed(far), dcgan(16, 1, NZ, 8, 8)[1]
    monitor = Monitor(G, D, real=real[:500], nz=NZ)
    gaps = []
    for step in range(20, 1400, 20):
        share = 1 / (1 + step / 300)
        G.images = share * far + (1 - share) * real[500:]
        assert monitor.check(step, _fine(step)) == []
        gaps.append(monitor.signals.get("gap", 0.0))
    assert max(gaps[15:]) > 0.35


def test_variety_of_real_images_is_that_of_real_images(real: Tensor) -> None:
    signals = Variety(real[:500], 100).signals(real[500:600])
    seen = dict(zip(SIGNALS, signals.tolist(), strict=True))
    assert seen["spread"] == pytest.approx(1.0, abs=0.15)
    assert seen["duplicates"] < 0.1
    assert seen["missing"] < 0.3
    assert seen["copies"] < 0.05
    assert seen["gap"] < 0.2
    assert seen["nearest"] == pytest.approx(1.0, abs=0.15)
    assert Variety(real[:500], 100).signals(real[100:200])[3] == 1


def test_nan_is_named_with_tensor_and_layer() -> None:
    G, D = dcgan(16, 1, NZ, 8, 8)
    z = torch.randn(32, NZ, 1, 1)
    monitor = Monitor(G, D, fixed_z=z)
    assert monitor.check(1, [1.0, 1.0, 0.5, 0.5]) == []
    assert nonfinite(G, D, z) is None
    with torch.no_grad():
        D.main[2].weight[0, 0, 0, 0] = float("nan")  # type: ignore[index]
    (found,) = monitor.check(2, [1.0, 1.0, 0.5, 0.5])
    assert (found.code, found.severity) == ("nonfinite", "error")
    assert found.where == "parameter main.2.weight of D, layer main.2 (Conv2d) of D"
    assert G.training and D.training


def test_large_finite_gradients_are_not_taken_for_infinite_ones() -> None:
    monitor = _with_gradients(1e33)
    assert monitor.check(1, [1.0, 1.0, 0.5, 0.5]) == []


def test_a_check_reads_once_and_draws_no_random_numbers(
    real: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    G, D = dcgan(16, 1, NZ, 8, 8)
    monitor = Monitor(G, D, real=real[:100], nz=NZ)
    before = {name: t.clone() for name, t in G.state_dict().items()}
    state = torch.get_rng_state()
    reads = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, name)

        def read(self: Tensor, original: Callable[[Tensor], object] = original) -> object:
            reads.append(self)
            return original(self)

        monkeypatch.setattr(Tensor, name, read)
    monitor.update(*torch.ones(4).unbind())
    assert reads == []
    monitor.check(1)
    assert len(reads) == 1
    monkeypatch.undo()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in G.state_dict().items())


def test_what_was_seen_goes_on_after_a_resume() -> None:
    signals = (0.001, 8.0, 1.0, 0.0)
    whole, first = Monitor(*dcgan(16, 1, NZ, 8, 8)), Monitor(*dcgan(16, 1, NZ, 8, 8))
    rows = [[value * (1 + step / 1e4) for value in signals] for step in range(900)]
    seen = [whole.check(step, rows[step]) for step in range(300, 900, 20)]
    again = [first.check(step, rows[step]) for step in range(300, 360, 20)]
    second = Monitor(*dcgan(16, 1, NZ, 8, 8))
    second.load_state_dict(first.state_dict())
    again += [second.check(step, rows[step]) for step in range(360, 900, 20)]
    assert seen == again
    assert sum(map(len, seen)) == 1


def test_too_few_real_images_are_refused(real: Tensor) -> None:
    with pytest.raises(pygan.UserError, match=r"at least 16"):
        Monitor(*dcgan(16, 1, NZ, 8, 8), real=real[:4], nz=NZ)
    with pytest.raises(pygan.UserError, match=r"latents"):
        Monitor(*dcgan(16, 1, NZ, 8, 8), real=real[:50])


def test_every_fault_has_a_run_that_is_broken_on_purpose() -> None:
    assert {case.code for case in CASES} == {None, *FAULTS}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] * (c.steps > 1000), id=c.code) for c in CASES[1:]],
)
def test_broken_runs_are_diagnosed(case: Case) -> None:
    assert len(diagnose(case, [0]).steps) == 1


@pytest.mark.parametrize("seed", range(2))
def test_healthy_runs_get_no_finding(seed: int) -> None:
    assert replace(CASES[0], steps=520).run(seed) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, HEALTHY_SEEDS))
def test_more_healthy_runs_get_no_finding(seed: int) -> None:
    assert CASES[0].run(seed) == []


def test_a_fault_that_is_missed_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missed = Case("nothing", "copies", 20)
    monkeypatch.setattr(diagnosis, "CASES", (replace(missed, code=None), missed))
    out = tmp_path / "table.md"
    assert diagnosis.main(["--seeds=1", f"--out={out}"]) == 1
    assert "| nothing | nothing | 1 of 1 |" in out.read_text()
    assert "| nothing | samples copy training images | 0 of 1 |" in out.read_text()
    assert capsys.readouterr().out.strip() == out.read_text().strip()


def test_fixes_are_few_and_survive() -> None:
    config = Config(nz=NZ, ngf=8, ndf=8)
    networks = Networks(config, 16, 1, torch.device("cpu"))
    fixes = AutoFix(networks.step)
    said = [fixes.apply(Finding("d_overpowers", step)) for step in range(6)]
    assert "0.9" in str(said[0])
    assert [text is None for text in said] == [False] * 4 + [True] * 2
    assert networks.opt_d.param_groups[0]["lr"] == pytest.approx(config.lr / 8)
    assert networks.opt_g.param_groups[0]["lr"] == config.lr
    assert fixes.apply(Finding("copies", 9)) is None
    assert fixes.apply(Finding("d_fooled", 9, over=True)) is None
    other = AutoFix(Networks(config, 16, 1, torch.device("cpu")).step)
    other.load_state_dict(fixes.state_dict())
    assert other._step.real_target == 0.9
    assert other.apply(Finding("d_overpowers", 9)) is None
    config = Config(nz=NZ, ngf=8, ndf=8, loss="wasserstein")
    wasserstein = Networks(config, 16, 1, torch.device("cpu"))
    assert "learning rate" in str(AutoFix(wasserstein.step).apply(Finding("d_overpowers", 1)))
    assert wasserstein.step.real_target == 1.0


def _rows(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def _claiming(monkeypatch: pytest.MonkeyPatch, code: str, at: int) -> None:
    """The monitor finds a fault at a step."""

    def check(self: Monitor, step: int, means: object = None) -> list[Finding]:
        return [Finding(code, step)] if step == at else []

    monkeypatch.setattr(Monitor, "check", check)


@pytest.mark.parametrize("fix", [False, True])
def test_findings_reach_console_log_and_tensorboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fix: bool
) -> None:
    _claiming(monkeypatch, "d_overpowers", 8)
    flags = ["--auto-fix"] if fix else []
    assert train("--steps=12", "--save-every=8", f"--outf={tmp_path}", *flags) == 0
    shown = capsys.readouterr().out
    assert "Step 8: D overpowers G. " in shown
    found = [row for row in _rows(tmp_path) if "finding" in row]
    codes = ["d_overpowers", "auto_fix"] if fix else ["d_overpowers"]
    assert [row["finding"] for row in found] == codes
    assert all(row["step"] == 8 and str(row["text"]) in shown for row in found)
    assert "findings/text_summary" in EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"]
    state = checkpoint.read_state(tmp_path / "resume.safetensors")
    assert state["auto_fix"]["real_target"] == (0.9 if fix else 1.0)
    # The picture of the losses, and a run that goes on, pass over rows that are no losses.
    assert (tmp_path / "losses.png").exists()
    assert resume(tmp_path, "--steps=16") == 0
    assert [row["finding"] for row in _rows(tmp_path) if "finding" in row] == codes


def test_fixes_without_a_monitor_contradict(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--auto-fix", "--no-monitor") == 2
    assert "leave out one of them" in capsys.readouterr().err


def test_without_a_monitor_nothing_is_looked_at(tmp_path: Path) -> None:
    assert train("--steps=4", "--no-monitor", f"--outf={tmp_path}") == 0
    assert checkpoint.read_state(tmp_path / "resume.safetensors")["monitor"] is None
    assert resume(tmp_path, "--steps=8", "--monitor") == 0


def _poisoned(monkeypatch: pytest.MonkeyPatch, at: int, times: int) -> list[int]:
    """NaN gets into D in a step, as often as given; where training then was, again and again."""
    original, steps = Batches.update, []

    def update(self: Batches, networks: Networks, step: int, count: int) -> None:
        original(self, networks, step, count)
        steps.append(step)
        if step == at and steps.count(at) <= times:
            with torch.no_grad():
                networks.D.main[0].weight[0, 0] = float("nan")

    monkeypatch.setattr(Batches, "update", update)
    return steps


def test_nan_goes_back_to_the_last_checkpoint_and_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = _poisoned(monkeypatch, at=9, times=1)
    run = tmp_path / "run"
    assert train("--steps=16", "--save-every=6", f"--outf={run}") == 0
    assert steps == [*range(12), *range(6, 16)]
    shown = capsys.readouterr().out
    assert "Rollback 1 of 3" in shown
    assert "parameter main.0.weight of D" in shown
    rows = _rows(run)
    assert [(row["step"], row.get("finding")) for row in rows] == [
        (4, None), (6, "nonfinite"), (8, None), (12, None), (16, None),
    ]  # fmt: skip
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("loss_d")] == [4, 8, 12, 16]
    state = checkpoint.read_state(run / "resume.safetensors")
    assert state["rollbacks"] == 1
    assert state["networks"]["opt_d"]["param_groups"][0]["lr"] == 1e-4
    # What a rollback changed goes on after a resume.
    monkeypatch.undo()
    assert resume(run, "--steps=20") == 0
    state = checkpoint.read_state(run / "resume.safetensors")
    assert state["rollbacks"] == 1
    assert state["networks"]["opt_g"]["param_groups"][0]["lr"] == 1e-4


def test_the_fourth_nan_is_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = _poisoned(monkeypatch, at=9, times=9)
    assert train("--steps=16", "--save-every=6", f"--outf={tmp_path}") == 1
    assert steps.count(9) == 4
    out, error = capsys.readouterr()
    assert out.count("Rollback") == 3
    assert "training has diverged and stops" in error
    assert checkpoint.nonfinite(checkpoint.read_state(tmp_path / "resume.safetensors")) is None


def test_other_latents_follow_a_rollback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[int, list[Tensor]] = {}
    original = Training._after_step

    def after(self: Training, stopping: bool, progress: object) -> None:
        state = self.batches.generator.get_state()
        drawn.setdefault(self.step, []).append(state)
        original(self, stopping, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(Training, "_after_step", after)
    _poisoned(monkeypatch, at=3, times=1)
    assert train("--steps=8", f"--outf={tmp_path}") == 0
    first, second = drawn[2]
    assert not torch.equal(first, second)
