"""Refuse a commit whose subject is longer than 72 characters: a hook of .pre-commit-config.yaml.

python tools/commit_subject.py .git/COMMIT_EDITMSG
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

LONGEST: Final = 72


def problem(message: str) -> str | None:
    """Return what is wrong with the subject: the first line that is neither empty nor git's comment."""
    lines = (line.rstrip() for line in message.splitlines())
    subject = next((line for line in lines if line and not line.startswith("#")), "")
    if len(subject) <= LONGEST:
        return None
    return f"commit subject: got {len(subject)} characters, expected at most {LONGEST}: {subject[:LONGEST]}|{subject[LONGEST:]}"


if __name__ == "__main__":
    sys.exit(problem(Path(sys.argv[1]).read_text(encoding="utf-8")))
