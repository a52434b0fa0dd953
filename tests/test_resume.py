"""A run that is killed at any moment and resumed ends as one that was left alone."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import TINY, numbers, resume, session, start, train, weights

from pygan import checkpoint
from pygan.train import main
from pygan.training import Batches

STEPS = 240


def _position(run: Path) -> int:
    if not (run / "config.json").exists():
        return 0
    return checkpoint.read_state(run / "resume.safetensors")["position"]


def _continued(run: Path, flags: list[str]) -> list[str]:
    """The command that goes on: a folder without a configuration holds no run yet."""
    if (run / "config.json").exists():
        return ["--resume", str(run)]
    return [*flags, f"--outf={run}"]


def _killed_while_training(run: Path, flags: list[str], source: random.Random) -> None:
    """Killed at some moment in the steps that follow one of its first lines."""
    lines = source.randrange(1, 15)
    with session(_continued(run, flags)) as (process, output):
        for line in output:
            lines -= line.startswith("[")
            if lines == 0:
                break
        time.sleep(source.uniform(0, 0.05))
        process.kill()
        process.join()
    assert lines == 0
    assert process.exitcode == -signal.SIGKILL


def _killed_while_saving(run: Path, flags: list[str], source: random.Random) -> None:
    """Killed in the middle of the n-th flush to the disk, or of the n-th rename."""
    trap = (source.choice(["fsync", "replace"]), source.randrange(1, 25))
    with session(_continued(run, flags), trap) as (process, output):
        output.read()
        process.join()
    assert process.exitcode == -signal.SIGKILL


def _killed_at_start(run: Path, flags: list[str], source: random.Random) -> None:
    """Killed at some moment of the first seconds of a fresh interpreter."""
    process = start("-m", "pygan.train", *_continued(run, flags))
    time.sleep(source.uniform(1, 5))
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_kill_and_resume_ends_in_the_same_bytes(tmp_path: Path) -> None:
    flags = [
        *TINY, f"--steps={STEPS}", "--batch-size=16", "--save-every=2", "--log-every=1",
        "--sample-every=5", "--flip", "--fused",
    ]  # fmt: skip
    kinds = [_killed_while_training] * 6 + [_killed_while_saving] * 4 + [_killed_at_start]
    source = random.Random(20)
    source.shuffle(kinds)
    run, positions = tmp_path / "killed", []
    for kill in kinds:
        kill(run, flags, source)
        positions.append(_position(run))
    # The kills fell all over the run, and none of them lost what had been saved.
    assert positions == sorted(positions)
    assert len(set(positions)) >= 6
    assert positions[-1] < STEPS

    whole = tmp_path / "whole"
    for folder in (run, whole):
        process = start("-m", "pygan.train", *_continued(folder, flags))
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert weights(run) == weights(whole)
    assert numbers(run) == numbers(whole)
    states = [checkpoint.read_state(folder / "resume.safetensors") for folder in (run, whole)]
    for state in states:
        del state["seconds"]
    assert checkpoint.pack_state(states[0]) == checkpoint.pack_state(states[1])
    for picture in ("real_samples.png", "fake_samples_epoch_000.png", "fake_samples_epoch_003.png"):
        assert (run / picture).read_bytes() == (whole / picture).read_bytes()
    assert not list(run.glob(".*.tmp"))


@pytest.mark.slow
def test_a_run_killed_while_it_is_created_is_either_there_or_not(tmp_path: Path) -> None:
    flags = [*TINY, "--steps=2"]
    assert train("--steps=2", f"--outf={tmp_path / 'whole'}") == 0
    created = set()
    for place in ("fsync", "replace"):
        for count in (1, 2, 4, 8):
            run = tmp_path / f"{place}{count}"
            with session([*flags, f"--outf={run}"], (place, count)) as (process, output):
                output.read()
                process.join()
            assert process.exitcode == -signal.SIGKILL
            created.add((run / "config.json").exists())
            assert main(_continued(run, flags)) == 0
            assert weights(run) == weights(tmp_path / "whole")
    assert created == {False, True}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("loss", ["bce", "minimax", "relativistic_pairing"])
def test_a_longer_run_is_a_short_one_continued(tmp_path: Path, fused: bool, loss: str) -> None:
    flags = (f"--loss={loss}", *(["--fused"] if fused else []))
    assert train("--steps=14", f"--outf={tmp_path / 'whole'}", *flags) == 0
    run = tmp_path / "parts"
    assert train("--steps=8", f"--outf={run}", *flags) == 0
    assert resume(run, "--steps=14") == 0
    assert weights(run) == weights(tmp_path / "whole")
    assert numbers(run) == numbers(tmp_path / "whole")


@pytest.mark.native
def test_mixed_precision_resumes_too(tmp_path: Path) -> None:
    flags = ("--fused", "--amp=bf16")
    assert train("--steps=8", f"--outf={tmp_path / 'whole'}", *flags) == 0
    assert train("--steps=4", f"--outf={tmp_path / 'parts'}", *flags) == 0
    assert resume(tmp_path / "parts", "--steps=8") == 0
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def _stop_after(monkeypatch: pytest.MonkeyPatch, run: Path, step: int, *flags: str) -> None:
    """Trains up to a step and then dies without saving, as if the power had failed."""
    original = Batches.real

    def real(self: Batches, number: int) -> torch.Tensor:
        if number == step:
            raise KeyboardInterrupt
        return original(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "real", real)
        assert train(f"--outf={run}", *flags) == 130


def test_what_came_after_the_checkpoint_is_cut_from_the_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--steps=20", "--save-every=7", "--log-every=3")
    assert train(f"--outf={tmp_path / 'whole'}", *flags) == 0
    run = tmp_path / "parts"
    _stop_after(monkeypatch, run, 13, *flags)
    assert [row["step"] for row in numbers(run)] == [3, 6, 9, 12]
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 15, "epo')
    assert _position(run) == 7
    assert resume(run) == 0
    # The interval in which the checkpoint fell has its mean over all three steps.
    assert numbers(run) == numbers(tmp_path / "whole")
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("loss_d")] == [3, 6, 9, 12, 15, 18, 20]


def test_resuming_a_finished_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--steps=3", f"--outf={tmp_path}") == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert resume(tmp_path) == 0
    assert "is finished (3 of 3 steps)" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_longer_goal_is_remembered(tmp_path: Path) -> None:
    assert train("--steps=3", f"--outf={tmp_path}") == 0
    assert resume(tmp_path, "--epochs=1", "--log-every=64") == 0
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    assert (config["epochs"], config["steps"], config["log_every"]) == (1, None, 64)
    assert [row["step"] for row in numbers(tmp_path)] == [3, 64, 128]


def test_the_resume_file_itself_may_be_named(tmp_path: Path) -> None:
    assert train("--steps=2", f"--outf={tmp_path}") == 0
    assert resume(tmp_path / "resume.safetensors", "--steps=3") == 0


def test_flags_that_say_the_same_are_no_contradiction(tmp_path: Path) -> None:
    assert train("--steps=2", f"--outf={tmp_path}") == 0
    assert train("--steps=4", f"--resume={tmp_path}") == 0


def test_other_threads_are_allowed_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("--steps=2", f"--outf={tmp_path}") == 0
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert resume(tmp_path, "--steps=3", "--threads=2") == 0
    assert "will not end in the very same bytes" in capsys.readouterr().out


def test_state_keeps_types_shapes_and_keys(tmp_path: Path) -> None:
    state = {
        "a": {0: torch.arange(6.0).reshape(2, 3).t(), 1: (1, 2.5, None)},
        "b": [True, "x", {}, []],
        "c": torch.tensor(3, dtype=torch.int64),
        "d": torch.tensor([1.5], dtype=torch.bfloat16),
    }
    path = tmp_path / "state"
    path.write_bytes(checkpoint.pack_state(state))
    back = checkpoint.read_state(path)
    assert torch.equal(back["a"][0], state["a"][0])  # type: ignore[index]
    assert back["a"][0].is_contiguous()
    assert back["a"][1] == (1, 2.5, None)
    assert back["b"] == state["b"]
    assert back["c"].dtype == torch.int64
    assert back["c"].shape == ()
    assert torch.equal(back["d"], state["d"])
