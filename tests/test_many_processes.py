"""Runs of several processes: they make the steps of one, end together, and go on together."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, multiprocessing, nn
from training import ROOT, TINY

import pygan
from pygan import distributed
from pygan.checkpoint import read_state
from pygan.distributed import (
    ALONE,
    Follower,
    SyncBatchNorm2d,
    World,
    check_batch,
    is_lost,
    synchronize_batch_norms,
    world,
)
from pygan.errors import UserError
from pygan.models import dcgan
from pygan.ops.norm_act import batch_groups
from pygan.run_folder import LOG, RESUME, RunFolder

MINUTES = 180  # seconds that a test waits for processes


def _start(processes: int, *flags: str, restarts: int = 0) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "-m", "pygan.train",
        *TINY, *flags,
    ]  # fmt: skip
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _finish(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=MINUTES)[0]
    finally:
        process.kill()


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    return [row for row in rows if "loss_d" in row]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 16, 16), "u1")
    np.save(folder / "images.npy", pixels)
    return f"--data={folder / 'images.npy'}"


# The same steps


def _flat(run: Path, network: str) -> Tensor:
    state = read_state(run / RESUME)["networks"][network]
    return torch.cat([t.flatten().double() for t in state.values() if t.is_floating_point()])


@pytest.mark.parametrize("way", [["--fused"], []], ids=["fused", "plain"])
def test_many_make_the_steps_of_one(way: list[str], images: str, tmp_path: Path) -> None:
    flags = [images, *way, "--sync-bn", "--steps=20", "--flip", "--log-every=1"]
    counts = (1, 2, 4) if way else (1, 2)
    running = {count: _start(count, *flags, f"--outf={tmp_path / str(count)}") for count in counts}
    for process in running.values():
        output = _finish(process)
        assert process.returncode == 0, output
        assert output.count("samples are in") == 1 and output.count("[0/3][0/8]") == 1
    one = _rows(tmp_path / "1")
    for count in counts[1:]:
        many = _rows(tmp_path / str(count))
        assert [row["step"] for row in many] == [row["step"] for row in one] == list(range(1, 21))
        for name in ("loss_d", "loss_g", "d_real", "d_fake", "d_fake_after"):
            found, expected = ([row[name] for row in rows] for rows in (many, one))
            np.testing.assert_allclose(found, expected, rtol=1e-4)
        for network in ("netG", "netD"):
            found, expected = (_flat(tmp_path / name, network) for name in (str(count), "1"))
            assert ((found - expected).norm() / expected.norm()).item() < 1e-4
        assert {path.name for path in (tmp_path / str(count)).glob("net*")} == {
            path.name for path in (tmp_path / "1").glob("net*")
        }


@pytest.mark.slow
def test_many_stream_the_images_of_one(tmp_path: Path) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (64, 16, 16), "u1")):
        Image.fromarray(pixels).save(source / f"{i:02}.png")
    for i in (3, 30):
        (source / f"{i:02}.png").write_bytes(b"broken")
    flags = [f"--data={source}", "--stream", "--fused", "--sync-bn", "--steps=12", "--log-every=1"]
    for count in (1, 2):
        process = _start(count, *flags, f"--outf={tmp_path / str(count)}")
        output = _finish(process)
        assert process.returncode == 0, output
    one, two = (_rows(tmp_path / name) for name in ("1", "2"))
    assert [row["replaced"] for row in two] == [row["replaced"] for row in one]
    assert one[-1]["replaced"] >= 2
    found, expected = ([row["loss_d"] for row in rows] for rows in (two, one))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_each_has_its_own_batch_norm_unless_told(images: str, tmp_path: Path) -> None:
    flags = [images, "--fused", "--steps=2", "--log-every=1"]
    for count in (1, 2):
        process = _start(count, *flags, f"--outf={tmp_path / str(count)}")
        assert _finish(process) and process.returncode == 0
    first, second = (_rows(tmp_path / name)[0]["loss_d"] for name in ("1", "2"))
    assert first != pytest.approx(second, rel=1e-4)
    assert first == pytest.approx(second, rel=0.3)


# The end of one


def _children(process: subprocess.Popen[str]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in path.read_text().split()]


def _kill_one_after(run: Path, process: subprocess.Popen[str], step: int) -> None:
    """Kills the last process as soon as the run has a checkpoint of ``step``."""
    end = time.monotonic() + MINUTES
    while time.monotonic() < end and process.poll() is None:
        log = run / LOG
        if (run / "config.json").exists() and log.exists():
            steps = [int(s) for s in re.findall(r'"step": (\d+)', log.read_text())]
            if steps and steps[-1] >= step:
                os.kill(_children(process)[-1], signal.SIGKILL)
                return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}: {_finish(process)}")


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc to find the processes")
def test_a_killed_process_ends_the_run(images: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(2, images, "--fused", "--steps=100000", "--save-every=8", f"--outf={run}")
    _kill_one_after(run, process, 16)
    output = _finish(process)
    assert process.returncode == 1
    assert "SIGKILL" in output or "another process of this run has ended" in output
    assert read_state(run / RESUME)["position"] >= 8


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc to find the processes")
def test_restarted_processes_go_on_from_the_checkpoint(images: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [images, "--fused", "--steps=120", "--save-every=8", f"--outf={run}"]
    process = _start(2, *flags, restarts=1)
    _kill_one_after(run, process, 16)
    output = _finish(process)
    assert process.returncode == 0, output
    announced = [int(step) for step in re.findall(r"step (\d+) of 120;", output)]
    assert announced[0] == 0 and len(announced) == 2 and announced[1] >= 8
    steps = [row["step"] for row in _rows(run)]
    assert steps == sorted(set(steps)) and steps[-1] == 120
    assert read_state(run / RESUME)["position"] == 120


def test_sigterm_stops_all_of_them_with_a_checkpoint(images: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(2, images, "--fused", "--steps=100000", "--log-every=2", f"--outf={run}")
    end = time.monotonic() + MINUTES
    while not (run / LOG).exists() or not (run / LOG).read_text():
        assert time.monotonic() < end and process.poll() is None, _finish(process)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = _finish(process)
    assert process.returncode != 0
    assert "stopped and saved at step" in output
    step = int(re.findall(r"stopped and saved at step (\d+)", output)[0])
    assert read_state(run / RESUME)["position"] == step


# Mistakes


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--batch-size=7", "--outf={run}"], "shared out evenly; give a multiple of 2"),
        ([], "name it with --outf"),
    ],
)
def test_mistakes_are_one_sentence(
    flags: list[str], text: str, images: str, tmp_path: Path
) -> None:
    words = [flag.format(run=tmp_path / "run") for flag in flags]
    process = _start(2, images, "--steps=1", *words)
    output = _finish(process)
    assert process.returncode != 0 and text in output


def test_parts_make_the_whole() -> None:
    parts = [World(rank, 4).part(12) for rank in range(4)]
    assert [list(range(12))[part] for part in parts] == [
        [0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11],
    ]  # fmt: skip
    with pytest.raises(UserError, match="give a multiple of 5"):
        check_batch(12, World(0, 5))
    check_batch(12, ALONE)


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert world() is ALONE
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert world() == World(1, 3, 1, 0)


def test_what_is_lost() -> None:
    assert is_lost(RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1234"))
    assert not is_lost(RuntimeError("shapes do not fit"))
    assert not is_lost(ValueError("timed out"))


def test_a_follower_has_the_methods_of_a_folder() -> None:
    public = {name for name in vars(RunFolder) if not name.startswith("_")}
    assert public - set(vars(Follower)) == {"create", "reopen"}


# Batch norm over all


def _twice(layer: nn.Module, x: Tensor, groups: int) -> list[Tensor]:
    """Output, gradients, and gradients of a gradient."""
    x = x.clone().requires_grad_(True)
    with batch_groups(groups):
        y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()
    leaves = [x, *layer.parameters()]
    first = torch.autograd.grad((y.square() * weights).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), leaves, allow_unused=True)
    buffers = [b.clone() for b in layer.buffers()]
    return [y.detach(), *first, *(s for s in second if s is not None), *buffers]


def _batch_norm(kind: type[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    layer = kind(3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        layer.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return layer


def _data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 4, 5, dtype=torch.float64, generator=generator) * 2 + 1


def test_alone_it_is_a_batch_norm() -> None:
    found = _twice(_batch_norm(SyncBatchNorm2d), _data(), 1)
    for ours, theirs in zip(found, _twice(_batch_norm(nn.BatchNorm2d), _data(), 1), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_groups_of_a_batch_are_batches() -> None:
    layer, plain = _batch_norm(SyncBatchNorm2d), _batch_norm(nn.BatchNorm2d)
    with batch_groups(2):
        found = layer(_data())
    expected = torch.cat([plain(half) for half in _data().chunk(2)])
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    layer = _batch_norm(SyncBatchNorm2d)
    x = _data()[World(rank, 2).part(8)].clone().requires_grad_(True)
    y = layer(x)
    whole = torch.linspace(-1, 1, 2 * y.numel(), dtype=y.dtype).view(8, *y.shape[1:]).sin()
    (y.square() * whole[World(rank, 2).part(8)]).sum().backward()
    for parameter in layer.parameters():
        dist.all_reduce(parameter.grad)
    found = {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad}
    torch.save(found | {"mean": layer.running_mean, "var": layer.running_var}, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_share_their_statistics(tmp_path: Path) -> None:
    multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    layer, x = _batch_norm(nn.BatchNorm2d), _data().requires_grad_(True)
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()
    (y.square() * weights).sum().backward()
    for name, expected in (("y", y), ("dx", x.grad)):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), expected.detach())
    for part in parts:
        torch.testing.assert_close(part["dw"], layer.weight.grad)
        torch.testing.assert_close(part["db"], layer.bias.grad)
        torch.testing.assert_close(part["mean"], layer.running_mean)
        torch.testing.assert_close(part["var"], layer.running_var)


def test_the_keys_of_a_network_stay() -> None:
    G, _ = dcgan(16, 1, 8, 8, 8)
    before = list(G.state_dict())
    assert list(synchronize_batch_norms(G).state_dict()) == before
    kinds = {type(m) for m in G.modules() if isinstance(m, nn.BatchNorm2d)}
    assert kinds == {SyncBatchNorm2d}
    z = torch.randn(4, 8)
    expected = G(z)
    pygan.fuse(G)
    torch.testing.assert_close(G(z), expected)


def _parallel_worker(rank: int, folder: str) -> None:
    """A step whose networks were wrapped by the caller, beside one that saw the whole batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    part = World(rank, 2).part(8)
    data = torch.Generator().manual_seed(1)
    real, z = torch.rand(8, 1, 16, 16, generator=data), torch.randn(8, 8, generator=data)
    found = {}
    for parallel in (True, False):
        torch.manual_seed(0)
        nets = dcgan(16, 1, 8, 8, 8, "none")
        for network in nets:
            synchronize_batch_norms(network)
            pygan.fuse(network)
        given = [distributed.parallel(network) if parallel else network for network in nets]
        optimizers = [torch.optim.SGD(network.parameters(), 1.0) for network in nets]
        tricks = pygan.Tricks(r1=1.0, r1_every=2, n_critic=2)
        step = pygan.AdversarialStep(*given, *optimizers, amp="off", tricks=tricks)
        share = part if parallel else slice(None)
        if parallel or rank == 0:
            # One process alone must not wait for the other's statistics.
            for layer in () if parallel else (m for net in nets for m in net.modules()):
                if isinstance(layer, SyncBatchNorm2d):
                    layer.__class__ = nn.BatchNorm2d
            for _ in range(3):
                step(real[share], z[share])
        weights = [p.detach().flatten() for net in nets for p in net.parameters()]
        found["parallel" if parallel else "alone"] = torch.cat(weights)
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def test_networks_that_are_parallel_already(tmp_path: Path) -> None:
    multiprocessing.spawn(_parallel_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    assert torch.equal(first["parallel"], second["parallel"])
    torch.testing.assert_close(first["parallel"], first["alone"], rtol=1e-4, atol=1e-6)


# The threads of a group


def _gloo_threads() -> int:
    """How many threads of this process are gloo's."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


def _leaving_worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    gc.disable()  # what a process has after it must not hang on when it was last collected
    with distributed.joined(world(), cpu):
        network = distributed.parallel(nn.Linear(2, 1))
        network(torch.ones(4, 2)).sum().backward()
        del network
        inside = _gloo_threads()
    Path(folder, str(rank)).write_text(json.dumps([inside, _gloo_threads()]))


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc to find the threads")
def test_no_thread_of_a_group_is_left_when_a_process_ends(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_leaving_worker, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        inside, after = json.loads((tmp_path / str(rank)).read_text())
        assert inside > 0 and after == 0
