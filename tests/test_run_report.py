"""The page of a run: what stands in it, and that a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import train

from pygan import evaluate, run_report
from pygan.config import Config
from pygan.run_folder import LOG, QUALITY, REPORT
from pygan.training import NUMBERS, plot

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measured run of three short epochs, with a finding in its log."""
    folder = tmp_path_factory.mktemp("run")
    generator = np.random.default_rng(0)
    np.save(folder / "a <b>.npy", generator.integers(0, 256, (64, 16, 16), "u1"))
    flags = [f"--data={folder / 'a <b>.npy'}", "--epochs=3", "--evaluate-every=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "SAMPLES", 1000)
        assert train(*flags, f"--outf={folder / 'run'}") == 0
    finding = {"step": 12, "finding": "d_overpowers", "severity": "warning", "text": "D < 3 & all"}
    with open(folder / "run" / LOG, "a") as file:
        file.write(json.dumps(finding) + "\n" + '{"step": 13, "loss_')
    return folder / "run"


def test_training_leaves_a_report_and_figures(run: Path) -> None:
    rows = [json.loads(line) for line in (run / QUALITY).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(row["samples"] == 1000 and row["features"] == "pixels" for row in rows)
    page = (run / REPORT).read_text()
    assert page.count("<figure>") == 4 and "real images" in page
    assert "The monitor found nothing." in page


def test_the_page_holds_all_it_shows(run: Path) -> None:
    page = run_report.page(run)
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert not re.search(r"url\((?!#)|@import", page)
    assert "D &lt; 3 &amp; all" in page and "D < 3" not in page
    assert "a &lt;b&gt;.npy" in page and "a <b>.npy" not in page
    # Three curves' panels, and each finding a line in all of them.
    assert page.count('id="axes_') == 3
    for name in ("Loss_D", "D(G(z)) after", "images/s"):
        assert name in page
    last = json.loads((run / QUALITY).read_text().splitlines()[-1])
    assert f"<b>{last['distance']:.2f}</b><span>Fréchet distance" in page
    assert "<b>--epochs 3</b>" in page and "<td>--nz 8</td>" not in page
    assert page == run_report.page(run)


def test_few_pictures_of_many(tmp_path: Path) -> None:
    for epoch in range(100):
        (tmp_path / f"fake_samples_epoch_{epoch:03d}.png").write_bytes(b"png")
    found = [int(e) for e in re.findall(r"<figcaption>epoch (\d+)", run_report._samples(tmp_path))]
    assert len(found) == run_report.PICTURES
    assert found[0] == 0 and found[-1] == 99
    assert max(np.diff(found)) - min(np.diff(found)) <= 1


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    from dataclasses import asdict

    config = asdict(Config()) | {"augment": [["color"]]}
    content: dict[str, Any] = {"config": config, "data": {"images": 5}, "pygan": {}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    page = run_report.page(tmp_path)
    assert "Nothing is logged yet." in page and "There are none yet." in page
    assert "Not measured yet" in page


@pytest.mark.parametrize(
    "changed", [{"config": {}}, {"data": {}}, {"data": {"images": "5"}}, {"config": [1]}]
)
def test_a_damaged_configuration_is_a_sentence(
    run: Path, tmp_path: Path, changed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((run / "config.json").read_text()) | changed
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert run_report.main([str(tmp_path)]) == 2
    assert "config.json is damaged" in capsys.readouterr().err
    if "config" in changed:
        assert evaluate.main([str(tmp_path)]) == 2
        assert "config.json is damaged" in capsys.readouterr().err


def test_rows_that_cannot_be_drawn_are_left_out(run: Path, tmp_path: Path) -> None:
    for name in ("config.json", LOG):
        shutil.copy(run / name, tmp_path)
    page = run_report.page(tmp_path)
    with open(tmp_path / LOG, "a") as log:
        row = json.loads((run / LOG).read_text().splitlines()[0])
        log.write(json.dumps(row | {"step": 10**400}) + "\n" + "[" * 10**5 + "\n")
        log.write(json.dumps({"step": 1, "severity": ["error"], "text": "x"}) + "\n")
    assert run_report.page(tmp_path) == page


def test_the_picture_of_losses_leaves_out_rows_that_are_not_whole() -> None:
    row = dict.fromkeys(NUMBERS, 0.5)
    rows = [{"step": 1, **row}, {"step": 2, **row}]
    picture = plot(rows)
    broken = [{"step": 3, "loss_d": 1.0}, {"step": 10**400, **row}, {**rows[0], "d_fake": []}]
    assert plot([*rows, *broken]) == picture != plot(rows[:1])


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert run_report.main([str(run), "--out", str(out)]) == 0
    assert out.read_text() == run_report.page(run)
    assert run_report.main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    out.touch()
    assert run_report.main([str(run), "--out", str(out / "page.html")]) == 2
    assert "--out" in capsys.readouterr().err


def _browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.skipif(_browser() is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_it(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(run_report.page(run))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update"]
    picture = tmp_path / "page.png"
    command = [
        _browser() or "", *flags, f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1100,2000", f"--screenshot={picture}", "--virtual-time-budget=3000",
    ]  # fmt: skip
    subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=120)
    from PIL import Image

    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[:2] == (2000, 1100)
    shown = subprocess.run(
        [*command[:-2], "--dump-dom", page.as_uri()],
        check=True, capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    assert shown.count("<figure>") == 4 and "D &lt; 3 &amp; all" in shown
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
