"""Print the import graph: the rooms, the edges between them, module cycles and the longest modules.

    python tools/rooms.py

The exit code is 1 if modules import each other in a cycle or a module exceeds the length limit. import-linter checks the
layers (`lint-imports`, part of `make lint`).
"""

from __future__ import annotations

import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("entrypoint", "lora_trainer")
MAX_LINES = 600


def room_of(module: str) -> str:
    """Return the room of a module: `entrypoint`, or the name below `lora_trainer`."""
    package, _, rest = module.partition(".")
    return package if package == "entrypoint" else rest.partition(".")[0] or package


def main() -> int:
    """Print the graph and return the exit code."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    imports = {module: sorted(graph.find_modules_directly_imported_by(module)) for module in sorted(graph.modules)}
    edges = Counter((room_of(module), room_of(target)) for module, found in imports.items() for target in found)
    below = {room: {to for (frm, to) in edges if frm == room and to != room} for room in {room_of(module) for module in imports}}
    try:
        order = list(TopologicalSorter(below).static_order())[::-1]
    except CycleError as error:
        print("rooms import each other:", " -> ".join(error.args[1]))
        return 1
    for room in order:
        modules = [module for module in imports if room_of(module) == room]
        to = ", ".join(f"{target} {edges[room, target]}" for target in order if edges[room, target] and target != room)
        print(f"{room} ({len(modules)} modules): {to or 'imports no other room'}")
    failed = False
    try:
        # a package does not import its own modules
        TopologicalSorter(imports).prepare()
        print("no module cycle")
    except CycleError as error:
        print("modules import each other:", " -> ".join(error.args[1]))
        failed = True
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > MAX_LINES:
                print(f"{path.relative_to(ROOT)}: {lines} lines, expected at most {MAX_LINES}")
                failed = True
    return failed


if __name__ == "__main__":
    sys.exit(main())
