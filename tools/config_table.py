"""The configuration table of both READMEs, generated from `lora_trainer.config`.

    python tools/config_table.py            print it
    python tools/config_table.py --write    put it between the markers of README.md and README.ko.md
    python tools/config_table.py --check    exit 1 if one of them is out of date

tests/unit/test_docs.py holds the files to it as well.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parent.parent
# a checkout need not be installed
sys.path.insert(0, str(ROOT))

from lora_trainer.config import config_table  # noqa: E402

READMES: Final = ("README.md", "README.ko.md")
BEGIN: Final = "<!-- config:begin -->"
END: Final = "<!-- config:end -->"


def render() -> str:
    """The table as GitHub Markdown, with a line break at the end."""
    lines = ["| Setting | Default | Allowed | Meaning |", "|---|---|---|---|"]
    for name, default, allowed, meaning in config_table():
        cells = (f"`{name}`", _code(default), allowed, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _code(default: str) -> str:
    # in words, where there is no value to show
    return default if default in ("required", "none", "all seven") else f"`{default}`"


def with_table(text: str, where: str) -> str:
    """`text` with the table between its markers. Raises `ValueError` unless each marker stands there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{where}: expected one '{BEGIN}' and, behind it, one '{END}'")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{render()}{END}{after}"


def main() -> int:
    """Print, write or check; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="update both READMEs")
    mode.add_argument("--check", action="store_true", help="say which README is out of date")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.check):
        sys.stdout.write(render())
        return 0
    outdated = 0
    for name in READMES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        wanted = with_table(text, name)
        if wanted == text:
            continue
        outdated += 1
        if arguments.write:
            path.write_text(wanted, encoding="utf-8")
        print(f"{name}: {'written' if arguments.write else 'out of date; run python tools/config_table.py --write'}")
    return 1 if outdated and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
