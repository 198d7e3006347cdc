"""Habits of the repository that no other tool checks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import REPOSITORY

TESTS = REPOSITORY / "tests"


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_module_imports_a_test_module(path: Path) -> None:
    """A change of one test must not break another; shared code belongs in a helper module or in conftest.py."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            imported |= {node.module or "", *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    test_modules = {test.stem for test in TESTS.rglob("test_*.py")}
    assert {name for name in imported if name.rpartition(".")[2] in test_modules} == set()
