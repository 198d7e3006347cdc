"""Generate the settings table of docs/configuration.md from `lora_trainer.config`.

    python tools/config_table.py            print the table
    python tools/config_table.py --write    write it between the markers of the page
    python tools/config_table.py --check    exit 1 if the page is out of date

tests/unit/test_docs.py runs the same check.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parent.parent
# import the package from the checkout, which need not be installed
sys.path.insert(0, str(ROOT))

from lora_trainer.config import config_table  # noqa: E402

PAGE: Final = "docs/configuration.md"
BEGIN: Final = "<!-- config:begin -->"
END: Final = "<!-- config:end -->"


def render() -> str:
    """Return the table as GitHub Markdown that ends in a line break."""
    lines = ["| Setting | Default | Allowed | Meaning |", "|---|---|---|---|"]
    for name, default, allowed, meaning in config_table():
        cells = (f"`{name}`", _code(default), allowed, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _code(default: str) -> str:
    # these are words, not values to copy
    return default if default in ("required", "none", "all seven") else f"`{default}`"


def with_table(text: str, where: str) -> str:
    """Return `text` with the table between its markers. Raise `ValueError` unless each marker occurs once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{where}: expected one '{BEGIN}', followed by one '{END}'")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{render()}{END}{after}"


def main() -> int:
    """Print, write or check the table. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help=f"update {PAGE}")
    mode.add_argument("--check", action="store_true", help=f"exit 1 if {PAGE} is out of date")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.check):
        sys.stdout.write(render())
        return 0
    path = ROOT / PAGE
    text = path.read_text(encoding="utf-8")
    wanted = with_table(text, PAGE)
    if wanted == text:
        return 0
    if arguments.write:
        path.write_text(wanted, encoding="utf-8")
    print(f"{PAGE}: {'written' if arguments.write else 'out of date; run python tools/config_table.py --write'}")
    return 1 if arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
