"""A new value of a vocabulary: the check names what it still needs, and no command fails with a bug before everything is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, load_tool
from made_metrics import made_run, write_bundle

from lora_trainer.errors import ExitCode
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling

LAST = list(Feeling)[-1]
DEFINITIONS = "lora_trainer/persona/definitions"
TINY_BASE = "tools/tiny_base/frames/phrases.yaml"
PROMPTS = "lora_trainer/data/assets/eval_prompts.jsonl"
FILES = ("SDS.md", TINY_BASE, "tools/vocabulary.py", *(f"data/train_data_type_{blood_type}.jsonl" for blood_type in BloodType))
Edit = Callable[[str], str]


def edit(file: Path, change: Edit) -> None:
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")


def python(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def copy_of_the_project(root: Path) -> Path:
    for package in ("entrypoint", "lora_trainer"):
        shutil.copytree(REPOSITORY / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    return root


@pytest.fixture(scope="module")
def new_feeling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project whose vocabulary has the feeling `bored`, and nothing else has."""
    root = copy_of_the_project(tmp_path_factory.mktemp("new-feeling"))
    line = f"    {LAST.name} = "
    edit(root / "lora_trainer/persona/vocabulary.py", lambda text: text.replace(line, f'    BORED = "bored", "심심함"\n{line}', 1))
    return root


@pytest.fixture(scope="module")
def described_feeling(new_feeling: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same copy with complete specifications, but without data."""
    root = tmp_path_factory.mktemp("described-feeling") / "copy"
    shutil.copytree(new_feeling, root)
    for blood_type in BloodType:
        file = root / DEFINITIONS / f"{blood_type}.yaml"
        edit(file, lambda text: text.replace(f"\n  {LAST}: ", f"\n  bored: 하품한다.\n  {LAST}: ", 1))
        edit(file, lambda text: text.replace(f"\n    {LAST}: ", f"\n    bored: [🥱, 😑]\n    {LAST}: ", 1))
    return root


def missing_in(root: Path, *arguments: str) -> tuple[int, dict[str, str]]:
    done = python(root, "tools/vocabulary.py", *arguments)
    assert done.stderr == ""
    return done.returncode, dict(line.split(": ", 1) for line in done.stdout.splitlines()[:-1])


def test_nothing_is_missing() -> None:
    assert list(load_tool("vocabulary").missing()) == []


def test_what_a_feeling_needs_is_reported_by_file_and_count(new_feeling: Path) -> None:
    code, lines = missing_in(new_feeling)
    expected = {
        "SDS.md": "1 rows missing: the tables differ from the vocabularies (python tools/vocabulary.py --write)",
        PROMPTS: "6 prompts missing: bored low 2, bored middle 2, bored high 2",
        TINY_BASE: "3 entries missing: feelings: bored (good or bad); faces: bored; openers: bored",
    }
    for blood_type in BloodType:
        expected[f"{DEFINITIONS}/{blood_type}.yaml"] = "2 entries missing: feelings: bored; emoji.by_feeling: bored"
        # `make data-check` reports what other feelings lack
        records = lines.pop(f"data/train_data_type_{blood_type}.jsonl")
        assert "bored low 12, bored middle 12, bored high 12" in records
    assert code == 1
    assert lines == expected


def test_what_an_expression_needs_is_reported_by_file_and_count(tmp_path: Path) -> None:
    root = copy_of_the_project(tmp_path)
    last = list(Expression)[-1]
    line = f"    {last.name} = "
    # the label is another value's
    label = last.gloss.replace(" ", "")
    new = f'    NOD = "nod", "끄덕임", "{label}"\n{line}'
    edit(root / "lora_trainer/persona/vocabulary.py", lambda text: text.replace(line, new, 1))
    code, lines = missing_in(root, "--write")
    assert code == 1
    assert "| `nod` | 끄덕임 |" in (root / "SDS.md").read_text(encoding="utf-8")
    expected = {
        "lora_trainer/persona/vocabulary.py": f"1 unique labels missing: nod: another value has {label}",
        "data/train_data_type_*.jsonl": "20 records missing: the face nod 20",
        TINY_BASE: "2 entries missing: face_emoji: nod; faces: no feeling shows nod",
    }
    assert {file: lines[file] for file in expected} == expected


def test_a_described_feeling_still_needs_data(described_feeling: Path) -> None:
    code, lines = missing_in(described_feeling)
    assert code == 1
    assert set(lines) == {"SDS.md", PROMPTS, TINY_BASE, *(f"data/train_data_type_{blood_type}.jsonl" for blood_type in BloodType)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(made_run(BloodType.A, prompts=10), tmp_path_factory.mktemp("bundles") / "first")


def commands(root: Path, bundle: Path, output: Path) -> dict[str, tuple[str, ...]]:
    data = str(root / "data" / "train_data_type_A.jsonl")
    base = str(REPOSITORY / "examples" / "tiny-base")
    return {
        "validate": ("validate", "--no-tokens", data),
        "validate in processes": ("validate", "--no-tokens", "--workers", "2", data),
        "generate": ("generate", "--count", "5", "--blood-type", "A", "--output", f"{output}/"),
        "run": (
            "run", "--blood-type", "A", "--data", str(root / "data"), "--base-model", base, "--output", f"file://{output}/",
            "--device", "cpu", "--work-dir", f"{output}-work",
        ),
        "compare": ("compare", str(bundle), str(bundle)),
    }  # fmt: skip


COMMANDS = tuple(commands(Path(), Path(), Path()))


@pytest.mark.parametrize("name", COMMANDS)
def test_an_incomplete_specification_ends_in_one_message(new_feeling: Path, bundle: Path, tmp_path: Path, name: str) -> None:
    done = python(new_feeling, "-m", "entrypoint", *commands(new_feeling, bundle, tmp_path / "out")[name])
    said = done.stdout + done.stderr
    assert done.returncode == ExitCode.CONFIG, said
    for blood_type in BloodType:
        assert said.count(f"{DEFINITIONS}/{blood_type}.yaml: feelings: missing bored") == 1
        assert said.count(f"{DEFINITIONS}/{blood_type}.yaml: emoji.by_feeling: missing bored") == 1
    assert "python tools/vocabulary.py" in said
    for unwanted in ("a bug", "Traceback", "UserWarning"):
        assert unwanted not in said
    assert not list((tmp_path / "out").glob("**/*.*"))


@pytest.mark.parametrize("name", ["validate", "generate"])
def test_a_feeling_without_data_stops_nothing(described_feeling: Path, bundle: Path, tmp_path: Path, name: str) -> None:
    data = described_feeling / "data" / "train_data_type_A.jsonl"
    edit(data, lambda text: "".join(text.splitlines(keepends=True)[:30]))
    done = python(described_feeling, "-m", "entrypoint", *commands(described_feeling, bundle, tmp_path / "out")[name])
    assert done.returncode == ExitCode.DONE, done.stdout + done.stderr
