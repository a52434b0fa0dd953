"""A short pass of tests/fuzz.py."""

from __future__ import annotations

import logging

import pytest
from fuzz import COMMANDS, OPERATIONS, READERS, Reader, call_many, command_many, read_many

from pygan import functional
from pygan.errors import UserError


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="pygan")


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_readers(reader: Reader) -> None:
    found = read_many(reader, reader.examples)
    assert found.examples >= 0.8 * reader.examples


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name: str) -> None:
    found = command_many(name)
    assert 0 < found.refused < found.examples


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    found = call_many(name)
    assert found.examples >= 50
    # One that takes nothing is not looked at.
    assert found.refused < found.examples


def test_every_public_operation_is_a_target() -> None:
    public = set(functional.__all__) - {"GanLoss"}
    assert public <= OPERATIONS.keys()


def test_a_reader_that_fails_is_found() -> None:
    def read(path: object) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        read_many(READERS[0]._replace(read=read), 5)

    def refuse(path: object) -> None:
        raise UserError("no")

    found = read_many(READERS[0]._replace(read=refuse), 5)
    assert found.refused == found.examples
