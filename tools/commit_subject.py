"""Reject commit subjects longer than 72 characters. A hook of .pre-commit-config.yaml runs this.

python tools/commit_subject.py .git/COMMIT_EDITMSG
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

LONGEST: Final = 72


def problem(message: str) -> str | None:
    """Return the problem with the subject, the first line that is neither empty nor one of git's comments, or None."""
    lines = (line.rstrip() for line in message.splitlines())
    subject = next((line for line in lines if line and not line.startswith("#")), "")
    if len(subject) <= LONGEST:
        return None
    return f"commit subject: got {len(subject)} characters, expected at most {LONGEST}: {subject[:LONGEST]}|{subject[LONGEST:]}"


if __name__ == "__main__":
    sys.exit(problem(Path(sys.argv[1]).read_text(encoding="utf-8")))
