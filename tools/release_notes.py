"""Print a release's notes: the section of its version in CHANGELOG.md.

    python tools/release_notes.py v1.2.3            print the notes
    python tools/release_notes.py --check v1.2.3    print 1.2.3 if project and chart have that version and the section exists

Uses only the standard library, because the release workflow installs no packages.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent


def section(changelog: str, version: str) -> str:
    """Return the text below `## [version]`, up to the next version or the links. Raise `ValueError` if there is none."""
    match = re.search(rf"(?ms)^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## |^\[[^\]]+\]: |\Z)", changelog)
    text = match[1].strip() if match else ""
    if not text:
        raise ValueError(f"CHANGELOG.md: no text below '## [{version}]'; move what is Unreleased there")
    return text + "\n"


def problems(root: Path, tag: str) -> list[str]:
    """Return every problem that prevents releasing `tag`."""
    version = tag.removeprefix("v")
    found = []
    if not re.fullmatch(r"v\d+\.\d+\.\d+", tag):
        found.append(f"got the tag {tag}, expected one such as v1.2.3")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    chart = (root / "charts" / "persona-train" / "Chart.yaml").read_text(encoding="utf-8")
    fields = dict(re.findall(r"(?m)^(version|appVersion): (\S+)$", chart))
    for where, got in {
        "pyproject.toml: version": project,
        "Chart.yaml: version": fields["version"],
        "Chart.yaml: appVersion": fields["appVersion"],
    }.items():
        if got != version:
            found.append(f"{where}: got {got}, expected {version}, as the tag has it")
    try:
        section((root / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    except ValueError as error:
        found.append(str(error))
    return found


def main() -> int:
    """Print the section or the checked version. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", help="such as v1.2.3")
    parser.add_argument("--check", action="store_true", help="print the version alone, or what keeps it from being released")
    arguments = parser.parse_args()
    version = arguments.tag.removeprefix("v")
    if found := problems(ROOT, arguments.tag):
        print("\n".join(found), file=sys.stderr)
        return 1
    print(version if arguments.check else section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
