"""Run `helm lint --strict` and `helm package` without a helm program, with Helm 4 as a library (locks/chart.txt).

python tools/chart_package.py lint              lint with each file of charts/persona-train/ci, and without values, which must fail
python tools/chart_package.py package FOLDER    write FOLDER/persona-train-<version>.tgz
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

import helm_python
import yaml

CHART: Final = Path(__file__).resolve().parent.parent / "charts" / "persona-train"
_WARNING: Final = 2


def problems(values: dict[str, Any]) -> list[str]:
    """Return the problems that a strict lint finds in the chart with `values`."""
    report = helm_python.lint(CHART, values, strict=True, namespace="personas")
    found = [f"{message['path']}: {message['error']}" for message in report["messages"] if message["severity"] >= _WARNING]
    return found or list(report["errors"])


def lint() -> int:
    """Lint with every example and without values. Return the exit code."""
    failed = False
    for path in sorted((CHART / "ci").glob("*-values.yaml")):
        found = problems(yaml.safe_load(path.read_text(encoding="utf-8")))
        failed |= bool(found)
        print(f"{path.relative_to(CHART.parent)}: {'; '.join(found) or 'clean'}")
    refused = problems({})
    if not any("/bloodType" in problem for problem in refused):
        failed = True
        print(f"without values: expected a problem that names bloodType, got {refused}")
    return int(failed)


def main() -> int:
    """Lint or package the chart. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("lint")
    commands.add_parser("package").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "lint":
        return lint()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(helm_python.package(CHART, destination=arguments.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
