"""What pygan is to reach on a GPU, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from benchmarks.device_peaks import Peaks
from benchmarks.gpu_peers import ANCHOR, BY_HAND_GRAPH
from benchmarks.step_model import NETWORKS, kernels, predict
from benchmarks.targets import NO_ROW, ratio_text, verdict

Record = dict[str, Any]


class Target(NamedTuple):
    """pygan in bfloat16 is to be ``must`` and better ``aim`` times as fast as the fastest side
    whose name fits the pattern ``peers``."""

    case: str
    what: str
    peers: str
    must: float
    aim: float


class Milliseconds(NamedTuple):
    """A step of pygan is to take at most so many."""

    case: str
    must: float
    aim: float


_PEERS = {
    "eager fp32 (TF32 convolutions)": "eager fp32",
    "eager with AMP": "eager bf16*",
    "torch.compile with AMP": "torch.compile*",
    "JAX": "JAX*",
}
_TIMES = {
    "dcgan64-128": ((3.8, 5.2), (3.0, 4.2), (1.75, 2.4), (1.6, 2.2)),
    "dcgan64-1024": ((4.0, 5.4), (1.9, 2.6), (1.7, 2.3), (1.6, 2.2)),
    "dcgan32-128": ((9.0, 12.0), (11.0, 16.0), (4.9, 6.7), (2.2, 3.0)),
}
TARGETS = tuple(
    Target(case, what, peers, must, aim)
    for case, limits in _TIMES.items()
    for (what, peers), (must, aim) in zip(_PEERS.items(), limits, strict=True)
)
ABSOLUTE = Milliseconds("dcgan64-128", must=1.11, aim=0.82)


def steps_by_case(result: Record) -> dict[str, list[Record]]:
    """Of each case, in the order in which the cases came."""
    found: dict[str, list[Record]] = {}
    for record in result["records"]:
        if record["kind"] != "step":
            continue
        found.setdefault(record["case"], []).append(record)
    return found


def _anchors(records: Sequence[Record]) -> dict[str, Record]:
    """pygan's record in each process."""
    timed = [record for record in records if "missing" not in record]
    return {record["part"]: record for record in timed if record["side"] == ANCHOR}


def against(records: Sequence[Record], peer: Record) -> Record | None:
    """pygan's speed against a peer, from the process in which both were timed."""
    anchor = _anchors(records).get(peer["part"])
    return None if anchor is None else anchor["ratios"].get(peer["side"])


def target_rows(result: Record) -> Iterator[list[str]]:
    """What was wanted, and what was measured."""
    steps = steps_by_case(result)
    for target in TARGETS:
        records = steps.get(target.case, [])
        peers = [
            record
            for record in records
            if "missing" not in record
            and fnmatchcase(record["side"], target.peers)
            and record["side"] != BY_HAND_GRAPH
        ]
        wanted = [f"{target.must:g}x", f"{target.aim:g}x"]
        peer = min(peers, key=lambda record: record["milliseconds"], default=None)
        ratio = None if peer is None else against(records, peer)
        if peer is None or ratio is None:
            yield [target.case, target.what, *wanted, NO_ROW, "not measured"]
            continue
        told = verdict(ratio["median"], target.must, target.aim)
        what = f"{target.what}: {peer['side']}"
        yield [target.case, what, *wanted, ratio_text(ratio), told]
    anchors = _anchors(steps.get(ABSOLUTE.case, []))
    wanted = [f"{ABSOLUTE.must:g} ms", f"{ABSOLUTE.aim:g} ms"]
    if not anchors:
        yield [ABSOLUTE.case, "absolute", *wanted, NO_ROW, "not measured"]
        return
    # The one beside the eager peers, where it was timed.
    parts = sorted(anchors, key=lambda name: not name.endswith("-eager"))
    took = anchors[parts[0]]["milliseconds"]
    told = verdict(-took, -ABSOLUTE.must, -ABSOLUTE.aim)
    yield [ABSOLUTE.case, "absolute", *wanted, f"{took:.3f} ms", told]


def model_rows(result: Record) -> Iterator[list[str]]:
    """What the model of the step (`benchmarks.step_model`) says at the measured peaks."""
    at = result["peaks"]
    for case, records in steps_by_case(result).items():
        took = [anchor["milliseconds"] for anchor in _anchors(records).values()]
        network, _, batch = case.partition("-")
        if not took or network not in NETWORKS:
            continue
        peaks = Peaks("", at["gflops_bf16"] / 1e3, at["gb_per_s"] / 1e3, "")
        found = kernels(network, int(batch))
        floor, launches = predict(found, peaks).roofs, sum(kernel.launches for kernel in found)
        best = min(took)
        yield [case, f"{floor:.3f}", str(launches), f"{best:.3f}", f"{floor / best:.0%}"]
