"""Check conventions of the repository that no other tool checks."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, load_tool

tool: Any = load_tool("commit_subject")
TESTS = REPOSITORY / "tests"


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_module_imports_a_test_module(path: Path) -> None:
    """Changing one test must not break another, so shared code belongs in a helper module or in conftest.py."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            imported |= {node.module or "", *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    test_modules = {test.stem for test in TESTS.rglob("test_*.py")}
    assert {name for name in imported if name.rpartition(".")[2] in test_modules} == set()


@pytest.mark.parametrize(
    ("message", "got"),
    [
        ("x" * 72, None),
        ("x" * 73 + "\n\nbody", 73),
        ("한" * 72 + "\n", None),
        ("\n# a comment of git's that is much longer than seventy-two characters, and no subject\nsubject\n" + "y" * 200, None),
        ("", None),
    ],
)
def test_a_commit_subject_has_at_most_72_characters(message: str, got: int | None) -> None:
    problem = tool.problem(message)
    assert (problem is None) if got is None else (f"got {got} characters, expected at most 72" in problem)


def test_pre_commit_runs_programs_of_the_locked_environment() -> None:
    """Every hook is local and names files that exist. `make lint` validates the file itself."""
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for hook in config["repos"][0]["hooks"]:
        program, *arguments = hook["entry"].split()
        assert program == "make" or program.startswith(".venv/bin/"), hook["id"]
        for argument in arguments:
            if argument.startswith("tools/"):
                assert (REPOSITORY / argument).is_file(), hook["id"]
            elif program == "make" and not argument.startswith("-"):
                assert re.search(rf"(?m)^{argument}:", makefile), hook["id"]


def test_renovate_finds_what_is_pinned() -> None:
    config = json.loads((REPOSITORY / "renovate.json").read_text(encoding="utf-8"))
    names = [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.iterdir()]
    names += [str(path.relative_to(REPOSITORY)) for folder in ("locks", "tools") for path in (REPOSITORY / folder).iterdir()]

    def files(manager: dict[str, Any]) -> list[str]:
        return sorted(name for pattern in manager["managerFilePatterns"] for name in names if re.search(pattern.strip("/"), name))

    assert files(config["pip_requirements"]) == ["locks/chart.txt", "locks/checkov.txt", "locks/dev-s3.txt"]
    (images,) = config["customManagers"]
    (pattern,) = images["matchStrings"]
    matches = {
        name: re.findall(pattern.replace("(?<", "(?P<"), (REPOSITORY / name).read_text(encoding="utf-8")) for name in files(images)
    }
    assert {name: [image for image, _, _ in found] for name, found in matches.items()} == {
        "Dockerfile": ["nvidia/cuda"], "tools/build_image.sh": ["ubuntu"],
    }  # fmt: skip
    rules = [rule for rule in config["packageRules"] if "allowedVersions" in rule]
    allowed = {rule["matchPackageNames"][0]: rule["allowedVersions"].strip("/") for rule in rules}
    for ((image, tag, _),) in matches.values():
        assert re.search(allowed[image], tag), f"{image}:{tag}"
