"""The model of a step: its kernels hold the work that `benchmarks.work` counts from the layers."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import step_model, work
from benchmarks.device_peaks import DEVICES, Peaks
from benchmarks.step_model import Kernel, kernels, main, predict
from pygan.models import dcgan

ROUND = Peaks("round numbers", 100.0, 1.0, "none")


@pytest.mark.parametrize(
    ("network", "gflops", "launches"), [("dcgan64", 2.275, 76), ("dcgan32", 0.376, 59)]
)
def test_work_of_a_step(network: str, gflops: float, launches: int) -> None:
    batch = 128
    size, channels = step_model.NETWORKS[network]
    with torch.device("meta"):
        models = dcgan(size, channels)
    counted = work.train_step_work(*models, (100, 1, 1), (channels, size, size), batch, 2)
    found = kernels(network, batch)
    flops = sum(kernel.flops for kernel in found)
    assert flops == counted.flops
    assert flops / batch == pytest.approx(1e9 * gflops, rel=2e-3)
    alike = ("convolution", "norm_act", "Adam")
    assert sum(kernel.bytes for kernel in found if kernel.kind in alike) == counted.bytes
    assert sum(kernel.launches for kernel in found) == launches
    assert {kernel.kind for kernel in found} == {*alike, "loss", "copy", "random"}


def test_one_layer_by_hand() -> None:
    (first,) = (k for k in kernels("dcgan32", 4) if k.name == "G main.3 forward")
    # 256 maps of 4x4 become 128 of 8x8, through a weight of 256x128x4x4.
    weight = 256 * 128 * 16
    assert first.flops == 2 * 4 * 16 * weight
    assert first.bytes == 2 * (4 * 256 * 16 + 4 * 128 * 64 + weight)


def test_gradients_that_nobody_wants_are_no_kernels() -> None:
    names = [kernel.name for kernel in kernels("dcgan32", 2)]
    # The generator needs the gradient of D's images, D itself does not; nobody that of the latents.
    assert names.count("D main.0 input grad") == 1
    assert "G main.0 input grad" not in names
    weight_grads = [name for name in names if name.endswith("weight grad")]
    assert len(weight_grads) == len(set(weight_grads)) == 8


def test_prediction() -> None:
    found = [Kernel("a", "x", 4e11, 1e9), Kernel("b", "y", 1e11, 3e9, launches=2)]
    assert [kernel.milliseconds(ROUND) for kernel in found] == [4.0, 3.0]
    assert [kernel.bound(ROUND) for kernel in found] == ["arithmetic", "bytes"]
    expected = (5.0, 4.0, 7.0, 3, 7.03, 7.0)
    assert predict(found, ROUND, graph_us=10, host_us=1000) == pytest.approx(expected)
    assert predict(found, ROUND, graph_us=10, host_us=4000).without_graph == 12.0


def test_table_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "a100", "--network", "dcgan32", "--batch", "64"]) == 0
    text = capsys.readouterr().out
    rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    cells = [row for row in rows if len(row) == 6 and row[0] != "kernel"]
    of_kernels = [row for row in cells if not row[0].startswith("**")]
    of_kinds = [row for row in cells if row[0].startswith("**") and row[0] != "**all**"]
    (total,) = (row for row in cells if row[0] == "**all**")
    for column in (2, 3, 4):
        for group in (of_kernels, of_kinds):
            found = sum(float(row[column]) for row in group)
            assert found == pytest.approx(float(total[column]), abs=0.006 * len(group))
    assert "312 TFLOP/s" in text and DEVICES["a100"].source in text


def test_peaks_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--network", "dcgan32", "--batch", "2", "--tflops", "700"]) == 0
    assert "700 TFLOP/s in bfloat16, 4.3 TB/s (given on the command" in capsys.readouterr().out
    assert main(["--device", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err
