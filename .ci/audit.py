"""Looks for known vulnerabilities in the packages of this environment, by pip-audit.

Exits 1 where there are some, with a line for each. What no advisory service was asked about, or
knows, is named and does not fail: it was not checked, and the line says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

# Pygan itself, and what a virtual environment holds from the start.
LEFT_OUT = ("pygan", "pip", "setuptools")


def installed() -> list[str]:
    """``name==version`` of each package, without the label of a local build, which no advisory
    names: torch 2.13.0+cpu is torch 2.13.0."""
    found = {d.metadata["Name"]: d.version.partition("+")[0] for d in distributions()}
    return sorted(f"{name}=={version}" for name, version in found.items() if name not in LEFT_OUT)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        pins, answer = Path(folder, "pins.txt"), Path(folder, "answer.json")
        pins.write_text("\n".join(installed()))
        words = ["pip-audit", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
        words += ["--requirement", str(pins), "--format", "json", "--output", str(answer)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if not answer.exists():
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            print(f"not checked: pip-audit ended with {done.returncode}: {reason}")
            return 0
        packages = json.loads(answer.read_text())["dependencies"]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    faults = [
        f"{package['name']} {package['version']}: {fault['id']}, mended in "
        f"{', '.join(fault['fix_versions']) or 'no version'}"
        for package in packages
        for fault in package.get("vulns", ())
    ]
    print(*faults, f"{len(packages) - len(unknown)} packages checked", sep="\n")
    if unknown:
        print(f"not checked, as the advisory service does not know them: {', '.join(unknown)}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
