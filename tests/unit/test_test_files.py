"""pytest imports test files by name: two of one name can't be collected together, which a run of one folder does not show."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_no_two_test_files_share_a_name() -> None:
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert names.total() > 100
    assert [name for name, count in names.items() if count > 1] == []
