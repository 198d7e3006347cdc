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
DATA = tuple(f"data/train_data_type_{blood_type}.jsonl" for blood_type in BloodType)
DOCUMENTS = ("SDS.md", "docs/data.ko.md")
FILES = (*DOCUMENTS, *DATA, TINY_BASE, "tools/tiny_base/__init__.py", "tools/tiny_base/frames.py", "tools/vocabulary.py")
OLD_ROW = "1 row wrong: run python tools/vocabulary.py --write"
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
    """Return the exit code of the check and, by file, what it lacks: the first line of each file."""
    done = python(root, "tools/vocabulary.py", *arguments)
    assert done.stderr == ""
    return done.returncode, dict(line.split(": ", 1) for line in reversed(done.stdout.splitlines()[:-1]))


def test_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    assert list(load_tool("vocabulary").missing()) == []


def test_what_a_feeling_needs_is_reported_by_file_and_count(new_feeling: Path) -> None:
    code, lines = missing_in(new_feeling)
    expected = {
        **dict.fromkeys(DOCUMENTS, OLD_ROW),
        PROMPTS: "6 prompts missing: bored low 2, bored middle 2, bored high 2",
        TINY_BASE: "3 values missing or wrong: feelings: bored is neither good nor bad; faces: none for the feeling bored; "
        "openers: no lines for the feeling bored",
    }
    for blood_type in BloodType:
        expected[f"{DEFINITIONS}/{blood_type}.yaml"] = "2 values missing: feelings: bored; emoji.by_feeling: bored"
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
        "lora_trainer/persona/vocabulary.py": f"1 label wrong: {label} means nod and {last}",
        "data/train_data_type_*.jsonl": "20 records missing: the face nod 20",
        TINY_BASE: "2 values missing or wrong: faces: no feeling shows nod; face_emoji: none for the face nod",
    }
    assert {file: lines[file] for file in expected} == expected


def test_a_described_feeling_still_needs_data(described_feeling: Path) -> None:
    code, lines = missing_in(described_feeling)
    assert code == 1
    assert set(lines) == {*DOCUMENTS, PROMPTS, TINY_BASE, *DATA}


def test_a_mistake_is_named_with_its_line(described_feeling: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(described_feeling, root)
    prompt = '{"context": {"summary": "", "current_emotion": {"type": "boredd", "intensity": "0.2"}}, "input": "심심한 사람"}\n'
    number = (root / PROMPTS).read_text(encoding="utf-8").count("\n") + 1
    edit(root / PROMPTS, lambda text: f"{text}{prompt}{{\n")
    edit(root / TINY_BASE, lambda text: text.replace("[pout]", "[pouting]", 1))
    edit(root / DEFINITIONS / "A.yaml", lambda text: text.replace("bored: [🥱, 😑]", "bored: [🥱, 하품]", 1))
    edit(root / "lora_trainer/persona/vocabulary.py", lambda text: text.replace('"bored", "심심함"', '"bored", "화"', 1))
    (root / "data" / "train_data_type_O.jsonl").unlink()
    code, lines = missing_in(root, "--write")
    wrong = {
        "lora_trainer/persona/vocabulary.py": ("1 label wrong", "화 means angry and bored"),
        f"{DEFINITIONS}/A.yaml": ("1 value wrong", "by_feeling.bored: '하품' is not one emoji"),
        PROMPTS: (
            "3 lines wrong",
            f"{number}: context.current_emotion.type: got 'boredd'",
            f"{number}: context.current_emotion.intensity",
            f"{number + 1}: ",
        ),
        TINY_BASE: ("2 values missing or wrong", "faces.angry.weak.0", "got 'pouting'"),
        "data/train_data_type_O.jsonl": ("1 line wrong", "No such file"),
    }
    assert code == 1
    for file, facts in wrong.items():
        assert [fact for fact in facts if fact not in lines[file]] == [], file
    assert not set(lines) & set(DOCUMENTS)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('BORED = "sad", "심심함"', "1 value wrong: BORED repeats SAD's 'sad'"),
        ('BORED = "Bored Of", "심심함"', "1 value wrong: 'Bored Of'; expected one English word in lower case"),
        ('BORED = "bored"', "1 Korean word missing: bored"),
    ],
)
def test_a_value_that_is_none_is_named(new_feeling: Path, tmp_path: Path, line: str, said: str) -> None:
    root = tmp_path / "copy"
    shutil.copytree(new_feeling, root)
    # at the end: the first of two equal values stays
    edit(root / "lora_trainer/persona/vocabulary.py", lambda text: text.replace('    BORED = "bored", "심심함"\n', "", 1))
    edit(
        root / "lora_trainer/persona/vocabulary.py",
        lambda text: text.replace("\n\n\nclass Expression", f"\n    {line}\n\n\nclass Expression"),
    )
    code, lines = missing_in(root)
    assert (code, lines["lora_trainer/persona/vocabulary.py"]) == (1, said)


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


def test_an_incomplete_specification_is_named_in_korean(new_feeling: Path, bundle: Path, tmp_path: Path) -> None:
    done = python(new_feeling, "-m", "entrypoint", *commands(new_feeling, bundle, tmp_path)["validate"], "--lang", "ko")
    assert f"{DEFINITIONS}/A.yaml: feelings: bored 값이 없습니다" in done.stderr
    assert "missing" not in done.stderr
    assert "페르소나 정의가 완전하지 않습니다" in done.stderr


@pytest.mark.parametrize("name", ["validate", "generate"])
def test_a_feeling_without_data_stops_nothing(described_feeling: Path, bundle: Path, tmp_path: Path, name: str) -> None:
    data = described_feeling / "data" / "train_data_type_A.jsonl"
    edit(data, lambda text: "".join(text.splitlines(keepends=True)[:30]))
    done = python(described_feeling, "-m", "entrypoint", *commands(described_feeling, bundle, tmp_path / "out")[name])
    assert done.returncode == ExitCode.DONE, done.stdout + done.stderr
