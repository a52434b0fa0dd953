"""pytest options and hooks of the benchmarks: collection, records, the summary."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import summary
from benchmarks.correct import CheckFailed
from benchmarks.measure import FULL, QUICK, Case, Plan, Session
from benchmarks.recorded import replay

RECORDS = pytest.StashKey[list[dict[str, Any]]]()
HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pygan benchmarks")
    group.addoption("--quick", action="store_true", help="few rounds: do the benchmarks work?")
    group.addoption("--rounds", type=int, help="samples of each side (at least 7 to be quoted)")
    group.addoption("--device", default="cpu", help="torch device (default: cpu)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []
    rounds = config.getoption("--rounds")
    if rounds is not None and rounds < 1:
        raise pytest.UsageError(f"--rounds is {rounds}; give a whole number of at least 1")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect ``bench_*.py``, which pytest's own pattern does not."""
    named = parent.session.isinitpath(file_path)
    if named or file_path.suffix != ".py" or not file_path.name.startswith("bench_"):
        return None
    return pytest.Module.from_parent(parent, path=file_path)


def _case_and_side(item: pytest.Item) -> tuple[Case, str] | None:
    """The case and side id of a test whose parameters come from `parameters.pairs`, else None."""
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return None
    params = item.callspec.params
    if "case" not in params or "side" not in params:
        return None
    return item.module.CASES[params["case"]], str(params["side"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    left_out = []
    for item in items:
        pair = _case_and_side(item)
        if pair and pair[0].side(pair[1]).full_only:
            left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _plan(config: pytest.Config) -> Plan:
    plan = QUICK if config.getoption("--quick") else FULL
    rounds = config.getoption("--rounds")
    return Plan(**{**vars(plan), "rounds": rounds}) if rounds else plan


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    pairs = [pair for item in request.session.items if (pair := _case_and_side(item))]
    selected = [(case.name, side) for case, side in pairs]
    yield Session(selected, _plan(request.config), torch.device(request.config.option.device))


@pytest.fixture
def keep(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], None]:
    """``keep(record)``: into the JSON and into the summary."""

    def run(record: dict[str, Any]) -> None:
        benchmark.extra_info.update(record)
        request.config.stash[RECORDS].append(record)

    return run


@pytest.fixture
def bench(
    session: Session, benchmark: Any, keep: Callable[[dict[str, Any]], None]
) -> Callable[[Case, str], None]:
    """``bench(case, side_id)``: check and measure the case once, then report this side."""

    def run(case: Case, side_id: str) -> None:
        side = case.side(side_id)
        if (reason := side.left_out(session.device)) is not None:
            pytest.skip(reason)
        benchmark.group = case.name
        try:
            if benchmark.disabled:
                benchmark(case.check, session.device, [side])
                return
            record = session.record(case, side)
        except CheckFailed as failure:
            red = str(failure)
        else:
            red = ""
        if red:
            pytest.fail(red, pytrace=False)
        samples = session.samples(case)[side.id]
        replay(benchmark, samples.durations, samples.iterations)
        keep(record)

    return run


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    records = config.stash[RECORDS]
    if not records:
        return
    terminalreporter.section("pygan: ratios within each round")
    for line in summary.plain_text(records):
        terminalreporter.write_line(line)
    if config.getoption("--quick"):
        terminalreporter.write_line("--quick: too few rounds to quote.")


def _command(config: pytest.Config) -> str:
    """The command line, with paths cut to what is inside the repository or to their last part."""
    shown = []
    for argument in map(str, config.invocation_params.args):
        option, equals, value = argument.partition("=")
        path = Path(value if equals else argument)
        if path.is_absolute():
            inside = path.is_relative_to(config.rootpath)
            short = str(path.relative_to(config.rootpath)) if inside else path.name
            argument = f"{option}={short}" if equals else short
        shown.append(argument)
    return shlex.join(["pytest", *shown])


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["node"] = machine_info["release"] = ""


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    for name in set(commit_info) - {"id", "dirty"}:
        del commit_info[name]


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    output_json["command"] = _command(config)
    output_json["quick"] = bool(config.getoption("--quick"))
