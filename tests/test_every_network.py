"""Every published network, fused and plain: what is compared, and how it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import every_network, machine
from benchmarks.correct import CheckFailed
from benchmarks.every_network import NETWORKS, Network


def row(name: str, precision: str, high: float) -> dict[str, Any]:
    ratio = {"median": 0.95, "low": 0.9, "high": high, "coverage": 0.96}
    return {"network": name, "precision": precision, "ratio": ratio,
            "seconds": {"fused": [0.1], "plain": [0.0952]}}  # fmt: skip


def test_a_pair_of_each_published_family() -> None:
    families = {name[:-2] for name in NETWORKS}
    assert len(families) == 19 and NETWORKS.keys() == {f"{f} {p}" for f in families for p in "GD"}


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_fit(name: str) -> None:
    network = NETWORKS[name]
    inputs = [
        torch.zeros(2, dtype=torch.long) if shape == "label" else torch.zeros(2, *shape)
        for shape in network.inputs
    ]
    found = network.make()(*inputs)
    assert all(y.shape[0] == 2 for y in ([found] if isinstance(found, torch.Tensor) else found))


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "emulated", lambda *_: None)  # on any CPU
    out = tmp_path / "a.json"
    assert every_network.main(["--quick", "--only", "WGAN, MLP D", f"--json={out}"]) == 0
    result = json.loads(out.read_text())
    assert [(r["network"], r["precision"]) for r in result["networks"]] == [
        ("WGAN, MLP D", "fp32"),
        ("WGAN, MLP D", "bf16"),
    ]
    assert all(len(seconds) == 6 for r in result["networks"] for seconds in r["seconds"].values())
    assert "of 2 are slower than 0.97 times" in capsys.readouterr().out
    assert every_network.main(["--only", "none"]) == 2
    assert "no network is called none" in capsys.readouterr().err


def test_slower_ones_are_named() -> None:
    rows = [row("a G", "fp32", 0.96), row("a G", "bf16", 0.98)]
    lines = list(every_network.report({"networks": rows}))
    assert lines[2] == "| a G | **0.95 (0.90–0.96)** | 0.95 (0.90–0.98) | 95.2 | 95.2 |"
    assert lines[-1] == (
        "1 of 2 are slower than 0.97 times plain torch's speed (a G fp32); "
        "of 1 it is not told (a G bf16)."
    )


def test_rounds_are_added_until_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every_network, "warm_up", lambda *_: 1.0)  # so a sample is one call
    rounds = iter([([1.0] * 11, [0.9] * 5 + [1.1] * 6), ([1.0] * 11, [1.1] * 11)])
    monkeypatch.setattr(every_network, "interleave", lambda *_: next(rounds))
    found = every_network.compare("conditional, MLP G", "fp32", every_network.PLAN, 60.0)
    assert len(found["seconds"]["fused"]) == 22 and found["ratio"]["low"] == 1.1
    monkeypatch.setattr(every_network, "interleave", lambda *_: ([1.0] * 11, [0.9] * 5 + [1.1] * 6))
    found = every_network.compare("conditional, MLP G", "fp32", every_network.PLAN)
    assert len(found["seconds"]["fused"]) == 11


def test_a_wrong_network_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1.001 if vars(self).get("fused") else 1)

    monkeypatch.setitem(NETWORKS, "wrong G", Network(lambda: Wrong(4, 4), ((4,),), 2))
    monkeypatch.setattr("pygan.fuse", lambda module: setattr(module, "fused", True))
    with pytest.raises(CheckFailed, match="wrong G, fused"):
        every_network.check("wrong G", "fp32")
