"""A short pass of tests/faults.py."""

from __future__ import annotations

from pathlib import Path

import faults
import pytest


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> faults.Workshop:
    return faults.Workshop(tmp_path_factory.mktemp("shop"), seed=1)


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
def test_faults(fault: faults.Fault, shop: faults.Workshop) -> None:
    tries = 3 if fault is faults.killed else 1
    row = fault(shop, tries)
    assert sum(row.outcomes.values()) == row.tries == tries


@pytest.mark.parametrize("fault", faults.ON_DISKS, ids=lambda fault: fault.__name__)
def test_faults_of_disks(fault: faults.Fault, shop: faults.Workshop, tmp_path: Path) -> None:
    if not faults.may_mount(tmp_path):
        pytest.skip("needs root, to mount a small disk")
    assert sum(fault(shop, 1).outcomes.values()) == 1


def test_what_is_lost_is_found(shop: faults.Workshop, tmp_path: Path) -> None:
    with pytest.raises(faults.Lost):
        faults.reported(tmp_path)
    with pytest.raises(faults.Lost, match="other bytes"):
        faults.Workshop.check_same(shop, shop.started(40))
