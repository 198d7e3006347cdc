"""Test which packages each command without a model imports: seconds that a user waits for, and what CI and data authors install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "data" / "train_data_type_A.jsonl"
TINY_BASE = REPOSITORY / "examples" / "tiny-base"

SETTINGS = frozenset(
    {
        "annotated_types", "click", "pydantic", "pydantic_core", "structlog", "typing_extensions", "typing_inspection", "yaml",
        # structlog imports rich to format tracebacks, and rich imports pygments and, if installed, attrs
        "attr", "pygments", "rich",
        # zstandard before Python 3.14
        "backports",
    }
)  # fmt: skip
RECORDS = SETTINGS | {"emoji", "regex"}
LINT = RECORDS | {
    "kiwipiepy", "kiwipiepy_model", "tqdm",
    # the persona classifier; numpy, scipy and scikit-learn import the rest if it is installed
    "charset_normalizer", "cloudpickle", "dateutil", "joblib", "narwhals", "numpy", "pandas", "psutil", "pyarrow", "scipy", "six",
    "sklearn", "threadpoolctl",
}  # fmt: skip

PROGRAM = """
import sys

def packages():
    return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names

before = packages()
from entrypoint.cli import run_cli

code = run_cli(sys.argv[1:])
# Cython's modules have generated names, such as _cython_3_1_4
found = {name for name in packages() - before if not name.startswith(("_", "cython_runtime"))}
print("packages:", *sorted(found), file=sys.stderr)
sys.exit(code)
"""


def imported(folder: Path, arguments: list[str]) -> set[str]:
    """Run a command in a process of its own, and return the packages that it imported from outside the standard library."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORA_TRAINER_", "COV_", "COVERAGE"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    word, *names = done.stderr.splitlines()[-1].split()
    assert word == "packages:"
    return set(names)


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], SETTINGS),
        (["--version"], SETTINGS),
        (["run", "--help"], SETTINGS),
        (["generate", "--help"], SETTINGS),
        (["promote", "--help"], SETTINGS),
        (["show-config", "--blood-type", "A"], SETTINGS),
        (
            ["check-storage", "--blood-type", "A", "--data", str(DATA), "--output", "out", "--base-model", str(TINY_BASE)],
            RECORDS,
        ),
        (["validate", "--no-tokens", str(DATA)], LINT),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_packages_that_a_command_imports(tmp_path: Path, arguments: list[str], allowed: frozenset[str]) -> None:
    found = imported(tmp_path, arguments)
    assert {"entrypoint", "lora_trainer", "click", "pydantic"} <= found, "the command did not run"
    extra = found - allowed - {"entrypoint", "lora_trainer"}
    assert not extra, (
        f"lora-trainer {arguments[0]} now imports {', '.join(sorted(extra))}. Move the import into the function that needs it; "
        "`python -X importtime -m entrypoint …` shows who imports it. If every use of the command needs the package, add it to the "
        "list in this file and measure with benchmarks/start.py what it costs."
    )
