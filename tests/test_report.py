"""`python -m pygan`: the report, its JSON form, the commands it forwards to, and mistakes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import pygan
from pygan import __main__, ops, report
from pygan.ops import native


def test_report_names_every_operation_and_implementation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert __main__.main([]) == 0
    text = capsys.readouterr().out
    table = text[text.index("Operation ") :].splitlines()[1:]
    words = iter(line.split() for line in table)
    for operation, implementations in ops.implementations().items():
        for index, (name, reason) in enumerate(implementations.items()):
            row = next(words)
            if index == 0:
                assert row.pop(0) == operation
            assert row[0] == name
            result = " ".join(row[1:])
            assert result.startswith(reason or "runs")
            assert result.endswith(", chosen on cpu") == (ops.chosen(operation) == name)
    assert next(words, None) is None


def test_json_report_tells_versions_and_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == report.collect().to_dict()
    assert found["versions"]["pygan"] == pygan.__version__
    assert found["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["versions"]["numpy"] == np.__version__
    assert 1 <= found["machine"]["cores"] <= (os.cpu_count() or 1)
    assert len(found["machine"]["gpus"]) == torch.cuda.device_count()
    assert set(found["operations"]) == set(ops.implementations())


@pytest.mark.native
def test_instruction_set_and_the_ones_to_force(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([]) == 0
    text = capsys.readouterr().out
    module = native.load()
    assert f"loaded, instruction set {module.isa()}\n" in text
    others = [name for name in module.isas() if name != module.isa()]
    assert ("PYGAN_ISA=" in text) == bool(others)
    assert all(name in text for name in others)


def test_missing_extension_shows_the_end_of_the_compilers_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "_build_log.txt"
    output = [f"norm_act.cpp:{line}: error: no" for line in range(200)]
    log.write_text("\n".join(["The C++ sources did not compile.", "", *output]))
    monkeypatch.setattr(native, "BUILD_LOG", log)
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "reason", lambda: "the extension was not built")
    assert __main__.main([]) == 0
    text = capsys.readouterr().out
    assert "Native      not loaded: the extension was not built\n" in text
    assert "| The C++ sources did not compile.\n" in text
    shown = [line for line in output if f"| {line}\n" in text]
    assert shown == output[-report.LOG_TAIL :]
    for operation in report.collect().operations.values():
        assert operation.implementations["cpu"] == "the extension was not built"
        assert operation.chosen["cpu"] == "torch"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--jsom"], "--json"),
        (["--frobnicate"], "--frobnicate"),
        (["--json", "more"], "more"),
        (["trian"], "train or sample"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (sentence,) = captured.err.splitlines()
    assert sentence.startswith("pygan: error: ")
    assert named in sentence


@pytest.mark.parametrize("command", ["train", "sample"])
def test_commands_are_forwarded(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([command, "--frobnicate"]) == 2
    assert f"pygan.{command}: error: " in capsys.readouterr().err.replace("python -m ", "")
