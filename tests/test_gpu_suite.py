"""The suite for a GPU, on a CPU: its parts' course, its limits, its tables."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    gpu_layers,
    gpu_operations,
    gpu_parts,
    gpu_peers,
    gpu_records,
    gpu_short_pass,
    gpu_steps,
    gpu_suite,
    gpu_tables,
    gpu_targets,
)
from benchmarks.bench_train_step import NZ, Setup, Way, require_right_steps, side_of
from benchmarks.correct import CheckFailed
from benchmarks.gpu_parts import Part
from benchmarks.gpu_replay import GRAPH, Replay
from benchmarks.steps import DCGAN_ADAM, Adam

CPU = torch.device("cpu")
START = {"kind": "start", "part": "hangs", "conditions": None, "peaks": {"gb_per_s": 1.0}}


def _run(main: Any, path: Path, *arguments: str) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    try:
        common = ["--out", str(path), "--name", "p", "--device", "cpu", "--tiny"]
        assert main([*common, *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    return list(gpu_records.read(path))


# The parts that measure


def test_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: Any, conv_pass: str) -> Any:
        right = gpu_layers.cudnn(problem, conv_pass)
        return lambda: right() * 1.1

    ways = {"cuDNN": gpu_layers.cudnn, "wrong": wrong, "cuda": gpu_layers.pygan_way("cuda")}
    ways["torch"] = gpu_layers.pygan_way("torch")
    monkeypatch.setattr(gpu_layers, "ways", lambda device: ways)
    monkeypatch.setattr(gpu_layers, "PASSES", ("down", "weight_grad"))
    records = _run(gpu_layers.main, tmp_path / "r")
    assert [record["kind"] for record in records] == ["start", *["layer"] * 8, "end"]
    by_side = {(r["pass"], r["side"]): r for r in records if r["kind"] == "layer"}
    for conv_pass in ("down", "weight_grad"):
        assert "the limit" in by_side[conv_pass, "wrong"]["missing"]
        assert "strided_conv" in by_side[conv_pass, "cuda"]["missing"]
        assert by_side[conv_pass, "torch"]["ratio"]["median"] > 0
        assert by_side[conv_pass, "cuDNN"]["microseconds"] > 0


def test_the_ends_of_a_batch_are_checked() -> None:
    shape = gpu_layers.Shape("tiny", gpu_layers.Layer(5, 3, 2), "up", 20)
    problem = shape.problem(CPU, seed=1)

    def last_image_wrong(problem: Any, conv_pass: str) -> Any:
        made = gpu_layers.cudnn(problem, conv_pass)()
        made[-1] += 1
        return lambda: made

    assert len(gpu_layers._seen(shape, problem).small) == 2 * gpu_layers.CHECKED
    gpu_layers._check(shape, "right", gpu_layers.cudnn, CPU)
    with pytest.raises(CheckFailed, match="wrong"):
        gpu_layers._check(shape, "wrong", last_image_wrong, CPU)


def test_operations(tmp_path: Path) -> None:
    records = _run(gpu_operations.main, tmp_path / "r")
    found = [record for record in records if record["kind"] == "operation"]
    assert not any("missing" in record for record in found)
    assert {record["case"].partition("-")[0] for record in found} == {
        "norm_act", "gan_d_loss", "image_batch",
    }  # fmt: skip
    ours = [record for record in found if record["side"] == "pygan"]
    assert len(ours) == 3 and all(record["ratio"]["median"] > 0 for record in ours)


def test_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = gpu_peers.ways("eager")
    few = [way for way in every if way.name in ("eager fp32", gpu_peers.BY_HAND_GRAPH)]
    chosen = [*few, every[-1]]
    monkeypatch.setattr(gpu_peers, "ways", lambda family, tiny: chosen)
    records = _run(gpu_steps.main, tmp_path / "r")
    steps = {record["side"]: record for record in records if record["kind"] == "step"}
    assert "needs an NVIDIA GPU" in steps[gpu_peers.BY_HAND_GRAPH]["missing"]
    assert set(steps[gpu_peers.ANCHOR]["ratios"]) == {"eager fp32"}
    assert steps["eager fp32"]["family"] == "eager"


def test_a_wrong_step_has_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gpu_peers.ways("eager")[0]

    def other_rate(models: Any, device: torch.device, adam: Adam) -> Any:
        return plain.build(models, device, adam._replace(lr=2 * adam.lr))

    way = Way("twice the rate", "fp32", other_rate)
    monkeypatch.setattr(gpu_peers, "ways", lambda family, tiny: [way])
    (step,) = (r for r in _run(gpu_steps.main, tmp_path / "r") if r["kind"] == "step")
    assert step["side"] == "twice the rate" and "float64" in step["missing"]


def test_families() -> None:
    assert gpu_peers.families()[0] == "eager"
    ways = gpu_peers.ways("compile-max-autotune")
    assert [way.name for way in ways] == ["torch.compile max-autotune bf16", gpu_peers.ANCHOR]
    eager = gpu_peers.ways("eager")
    assert sum(way.baseline for way in eager) == 6 and eager[-1].name == gpu_peers.ANCHOR


def test_what_was_checked_compiled_is_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile_it(network: Any, **options: Any) -> Any:
        assert options == {"dynamic": False, "mode": "some"}
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", compile_it)
    setup = Setup((1, 16, 16), batch=2, width=2)
    build = gpu_peers.Compiled(mode="some")
    first = build(setup.models(), CPU, Adam(lr=1.0, eps=1.0))
    second = build(setup.models(), CPU, DCGAN_ADAM)
    assert second is first and len(compiled) == 2
    assert first.nets.opt_d.param_groups[0]["lr"] == DCGAN_ADAM.lr
    assert first.nets.opt_g.param_groups[0]["eps"] == DCGAN_ADAM.eps


def test_steps_fit_into_the_time() -> None:
    assert gpu_steps._fitting([0.001, 0.01], rounds=5, seconds=10.0) == [200, 80]
    assert gpu_steps._fitting([0.001, 0.01], rounds=5, seconds=-1.0) == [1, 1]


def test_short_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_short_pass.main(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    autos = [line for line in lines if " by auto" in line]
    assert len(autos) == 11 and all(line.endswith("ran") for line in autos)


@pytest.mark.parametrize("form", ["dilated", "phases"])
def test_jax_makes_the_same_updates(form: str) -> None:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "cpu":
        pytest.skip("JAX runs on a GPU here")
    from benchmarks import jax_step

    setup = Setup((1, 16, 16), batch=4, width=4)
    way = Way(f"JAX {form}", "fp32", jax_step.builder(form, "float32"))
    require_right_steps(setup, CPU, [way], batch=4, steps=2)
    call: Any = side_of(way, setup).build(CPU)
    call()
    call.wait()


# On a GPU


@pytest.mark.gpu
def test_replay_is_a_graph() -> None:
    device = torch.device("cuda")
    sums: list[Tensor] = []

    def build() -> Any:
        x = torch.ones(8, device=device, requires_grad=True)
        y = (x * 3).sum()
        total = torch.zeros(8, device=device)
        sums.append(total)
        return lambda: total.add_(torch.autograd.grad(y, x, retain_graph=True)[0])

    replay = Replay([build, build], device, repeats=5)
    assert (replay.how, replay.count) == (GRAPH, 10)
    before = [total.clone() for total in sums]
    replay()
    for total, was in zip(sums, before, strict=True):
        assert torch.equal(total - was, torch.full((8,), 15.0, device=device))


@pytest.mark.gpu
def test_graph_captured_by_hand_makes_the_same_updates() -> None:
    way = Way("by hand", "bf16", gpu_peers.hand_graph)
    require_right_steps(Setup((3, 32, 32), width=16), torch.device("cuda"), [way], 16, 5)


@pytest.mark.gpu
def test_graph_captured_by_hand_draws_new_latents() -> None:
    setup = Setup((1, 16, 16), batch=4, width=8)
    stepper = gpu_peers.hand_graph(setup.models(), torch.device("cuda"), DCGAN_ADAM)
    real = setup.real(4, torch.Generator().manual_seed(0)).cuda()
    seen = [float(stepper.step(real).loss_g) for _ in range(3)]
    assert len(set(seen)) == 3 and stepper.nets.generator.main[0].in_channels == NZ


# The suite


def _python(name: str, code: str, **fields: Any) -> Part:
    fields = {"limit": 30, "least": 1, **fields}
    return Part(name, (sys.executable, "-c", code), **fields)


def _alive(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    # Nobody may have asked for its exit status yet.
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_each_part_is_lost_alone(tmp_path: Path) -> None:
    record = f"open({str(tmp_path / 'records.jsonl')!r}, 'a').write"
    waits = f"{record}('{json.dumps(START)}\\n'); print('waiting', flush=True)"
    # Its child would outlive it.
    waits += f"\nimport subprocess; p = subprocess.Popen(['sleep', '60']); {record}(str(p.pid))"
    waits += "\nimport time; time.sleep(60)"
    suite = gpu_suite.Suite(tmp_path, "command", minutes=10, dry_run=True)
    started = time.monotonic()
    suite.run(
        [
            _python("crashes", "import os; os.abort()"),
            _python("fails", "print('why'); raise SystemExit(3)"),
            _python("hangs", waits, limit=1.5),
            _python("absent", "", missing="there is no such program"),
            _python("empty", "raise SystemExit(5)", harmless=(0, 5)),
            _python("works", "print('it works')"),
            _python("too long", "", least=3600),
        ]
    )
    assert time.monotonic() - started < 20
    states = {outcome.part: (outcome.state, outcome.reason) for outcome in suite.outcomes}
    assert states["crashes"] == ("failed", "signal 6; log.txt has what it printed")
    assert states["fails"] == ("failed", "exit status 3; log.txt has what it printed")
    assert states["hangs"][0] == "stopped"
    assert states["absent"] == ("left out", "there is no such program")
    assert states["empty"][0] == states["works"][0] == "done"
    assert states["too long"][0] == "left out" and "it takes 3600" in states["too long"][1]
    log = (tmp_path / "log.txt").read_text()
    assert "why" in log and "waiting" in log and "it works" in log
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert not _alive(int(lines[1]))
    result = json.loads((tmp_path / "results.json").read_text())
    # The child's number is no record.
    assert [entry["kind"] for entry in result["records"]] == ["start"]
    assert len(result["parts"]) == 7


def test_all_parts_end_within_the_minutes(tmp_path: Path) -> None:
    started = time.monotonic()
    suite = gpu_suite.Suite(tmp_path, "command", (gpu_suite.RESERVE + 3) / 60, dry_run=True)
    # It does not listen, and has a limit of its own far beyond.
    deaf = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: None); time.sleep(60)"
    suite.run([_python("deaf", deaf), _python("later", "")])
    assert time.monotonic() - started < gpu_suite.RESERVE + 3
    assert [outcome.state for outcome in suite.outcomes] == ["stopped", "left out"]


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "found"
    arguments = ["--out", str(folder), "--dry-run", "--only", "build,operations"]
    assert gpu_suite.main(arguments) == 0
    assert "operations done" in capsys.readouterr().out
    result = json.loads((folder / "results.json").read_text())
    assert result["command"].endswith("gpu_suite --out found --dry-run --only build,operations")
    assert [part["state"] for part in result["parts"]] == ["left out", "done"]
    assert str(tmp_path) not in json.dumps({**result, "records": None})
    assert "A dry run" in (folder / "summary.md").read_text()
    assert "norm_act" in (folder / "layers.md").read_text()
    assert gpu_suite.main(arguments) == 2
    assert "holds results already" in capsys.readouterr().err
    again = ["--out", str(tmp_path / "more"), "--dry-run", "--only", "build"]
    assert gpu_suite.main([*again, "--add", str(folder / "results.json")]) == 0
    assert "norm_act" in (tmp_path / "more" / "layers.md").read_text()
    assert gpu_suite.main([*again, "--add", str(tmp_path / "none.json")]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main(["--out", str(tmp_path / "found")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "torch sees no NVIDIA GPU" in said
    assert not (tmp_path / "found").exists()


def test_parts_are_chosen_by_their_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    every = gpu_parts.parts(Path("found"))
    names = [part.name for part in every]
    assert names[:5] == ["build", "tests", "layers", "steps-dcgan64-128-eager", "operations"]
    assert len(set(names)) == len(names) == 5 + 6 * len(gpu_peers.families())
    chosen = gpu_parts.selected(every, "tests, steps-dcgan64-128")
    assert [part.name for part in chosen][:2] == ["tests", "steps-dcgan64-128-eager"]
    assert len(chosen) == 1 + len(gpu_peers.families())
    assert gpu_suite.main(["--out", "found", "--dry-run", "--only", "step"]) == 2
    assert "names no part" in capsys.readouterr().err


# Tables


def _step(part: str, side: str, ms: float, ratios: dict[str, float] | None = None) -> Any:
    ratio = {
        name: {"median": value, "low": value, "high": value, "coverage": 1.0}
        for name, value in (ratios or {}).items()
    }
    return {
        "kind": "step", "part": part, "case": "dcgan64-128", "side": side, "milliseconds": ms,
        "ratios": ratio,
    }  # fmt: skip


def test_targets() -> None:
    ours = gpu_peers.ANCHOR
    records = [
        _step("s-eager", "eager fp32", 5.0),
        _step("s-eager", "eager fp32 by hand", 3.0),
        _step("s-eager", "eager bf16", 4.0),
        _step("s-eager", "eager bf16 by hand", 3.5),
        _step("s-eager", gpu_peers.BY_HAND_GRAPH, 1.1),
        _step("s-eager", ours, 1.0, {"eager fp32": 5.3, "eager bf16 by hand": 3.5}),
        # Slower in this process, and what is compared with its peer is this one.
        _step("s-jax", "JAX jit bf16, dilated", 1.8),
        _step("s-jax", ours, 1.2, {"JAX jit bf16, dilated": 1.5}),
        {**_step("s-c", "torch.compile default bf16", 1.0), "missing": "it failed"},
    ]
    rows = list(gpu_targets.target_rows({"records": records}))
    found = {(row[0], row[1].partition(":")[0]): row[4:] for row in rows}
    assert len(found) == 13
    eager = "eager fp32 (TF32 convolutions)"
    assert found["dcgan64-128", eager] == ["5.30 (5.30–5.30)", "aim reached"]
    assert found["dcgan64-128", "eager with AMP"] == ["3.50 (3.50–3.50)", "met"]
    assert found["dcgan64-128", "JAX"] == ["1.50 (1.50–1.50)", "missed"]
    assert found["dcgan64-128", "torch.compile with AMP"] == ["–", "not measured"]
    assert found["dcgan64-128", "absolute"] == ["1.000 ms", "met"]
    assert found["dcgan32-128", "JAX"] == ["–", "not measured"]


def test_runs_are_joined() -> None:
    def run(command: str, records: Any, *states: tuple[str, str]) -> Any:
        return {
            "command": command, "conditions": {"device": command}, "peaks": {"gb_per_s": 1.0},
            "tests": None, "records": records, "dry_run": False,
            "parts": [{"part": part, "state": state} for part, state in states],
        }  # fmt: skip

    old = [_step("a", "x", 1.0), _step("b", "x", 2.0)]
    new = [_step("b", "x", 3.0)]
    first = run("one", old, ("a", "done"), ("b", "stopped"), ("c", "left out"))
    second = run("two", new, ("b", "done"), ("a", "left out"))
    found = gpu_tables.joined([first, second])
    assert found["records"] == [old[0], new[0]]
    assert [(part["part"], part["state"]) for part in found["parts"]] == [
        ("a", "done"), ("c", "left out"), ("b", "done"),
    ]  # fmt: skip
    assert found["command"] == "one` and `two" and found["conditions"]["device"] == "two"


def test_model_beside_the_measurement() -> None:
    peaks = {"gflops_bf16": 788e3, "gb_per_s": 4300.0}
    records = [_step("s-eager", gpu_peers.ANCHOR, 1.0)]
    (row,) = gpu_targets.model_rows({"records": records, "peaks": peaks})
    assert row == ["dcgan64-128", "0.574", "76", "1.000", "57%"]


def test_tests_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    assert gpu_tables.tests(path) is None
    path.write_text(
        "<testsuites><testsuite>"
        "<testcase classname='t.a' name='one'/>"
        "<testcase classname='t.a' name='two'><failure>no</failure></testcase>"
        "<testcase classname='t.b' name='three'><skipped/></testcase>"
        "</testsuite></testsuites>"
    )
    assert gpu_tables.tests(path) == {"passed": 1, "skipped": 1, "failed": ["t.a::two"]}


def test_a_line_cut_off_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"kind": "start"}\n{"kind": "st')
    assert list(gpu_records.read(path)) == [{"kind": "start"}]
