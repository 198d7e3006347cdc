"""Remove files that the job never uses from an environment and print the size of each cut. The image's build runs this.

    python tools/trim_packages.py /opt/venv/lib/python3.12/site-packages

Uses only the standard library. Each cut states its reason. Missing files are ignored, so the GPU and CPU images share one list.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MIB: Final = 1024 * 1024


@dataclass(frozen=True)
class Cut:
    """Files to remove. `patterns` are globs below site-packages; files whose name matches the regex `keep` stay."""

    what: str
    why: str
    patterns: tuple[str, ...]
    keep: str = r"(?!)"


def cuts(site: Path) -> tuple[Cut, ...]:
    """Return all cuts. They keep the bitsandbytes library for the CUDA version of the installed torch."""
    return (
        Cut("unsloth's web studio", "a browser application with its server, and its installers", ("studio",)),
        Cut(
            "bitsandbytes for other accelerators",
            "it loads the one of torch's CUDA version",
            ("bitsandbytes/libbitsandbytes_*.so",),
            keep=rf"libbitsandbytes_(cpu|cuda{_torch_cuda(site)})\.so",
        ),
        Cut(
            "CUDA libraries that nothing links",
            "a solver for several GPUs, and a second copy of the run-time compiler",
            ("nvidia/*/lib/libcusolverMg.so*", "nvidia/*/lib/libnvrtc*.alt.so*"),
        ),
        Cut(
            "static libraries and device code to link against",
            "nothing is linked with them at run time",
            ("nvidia/**/*.a", "nvidia/nvshmem/lib/*.bc", "triton/backends/nvidia/lib/cupti/*.a"),
        ),
        Cut("the packages' own tests", "imported by nobody else", ("test", "**/tests")),
        Cut(
            "Arrow's RPC, and its headers",
            "datasets reads and writes tables, no more",
            ("pyarrow/*flight*", "pyarrow/include"),
        ),
        Cut("protobuf's compiler", "torch was built with it", ("torch/bin/protoc*",)),
    )


def strippable(site: Path) -> Iterator[Path]:
    """Yield the libraries whose wheels contain debug information."""
    yield from site.glob("triton/_C/libtriton.so")


def _torch_cuda(site: Path) -> str:
    """Return '130' if torch is built for CUDA 13.0 and so on, or 'none' for a CPU build or without torch."""
    version = site / "torch" / "version.py"
    if not version.is_file():
        return "none"
    found = re.search(r"^cuda\b.*= '(\d+)\.(\d+)'", version.read_text(encoding="utf-8"), re.MULTILINE)
    return "".join(found.groups()) if found else "none"


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files below a folder. Count a link as its own few bytes."""
    if path.is_dir() and not path.is_symlink():
        return sum(size_bytes(child) for child in path.iterdir())
    return path.lstat().st_size


def libraries(path: Path) -> set[str]:
    """Return the names of the shared libraries at or below a path."""
    found = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
    return {file.name for file in found if re.search(r"\.so(\.\d+)*$", file.name)}


def missing_libraries(site: Path, removed: set[str]) -> list[str]:
    """Return one line for each remaining library that links a removed one."""
    problems = []
    stayed = sorted(path for path in site.rglob("*.so*") if path.is_file() and libraries(path))
    for path in stayed if removed else []:
        read = subprocess.run(["readelf", "--dynamic", "--wide", path], capture_output=True, text=True, check=False)
        needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", read.stdout))
        problems += [f"{path.relative_to(site)} needs {name}, which was cut" for name in sorted(needed & removed)]
    return problems


def remove(site: Path, cut: Cut, removed: set[str]) -> int:
    """Remove the files of a cut and add their libraries to `removed`. Return the freed bytes."""
    freed = 0
    # outer folders come first; skip matches that disappeared with them
    for path in sorted({path for pattern in cut.patterns for path in site.glob(pattern)}):
        if re.fullmatch(cut.keep, path.name) or not (path.exists() or path.is_symlink()):
            continue
        freed += size_bytes(path)
        removed |= libraries(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return freed


def strip_debug(library: Path) -> int:
    """Strip debug information from a library. Return the freed bytes. Raise `CalledProcessError` if `strip` fails."""
    before = library.stat().st_size
    subprocess.run(["strip", "--strip-debug", library], check=True)
    return before - library.stat().st_size


def main() -> int:
    """Apply all cuts and print one line for each. Return the exit code."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.stderr.write(f"{__doc__}\n")
        return 2
    site = Path(sys.argv[1])
    before = size_bytes(site)
    removed: set[str] = set()
    for cut in cuts(site):
        print(f"{remove(site, cut, removed) / MIB:8,.1f} MiB  {cut.what}: {cut.why}")
    for library in strippable(site):
        print(f"{strip_debug(library) / MIB:8,.1f} MiB  debug information of {library.name}")
    print(f"{before / MIB:8,.1f} MiB before, {size_bytes(site) / MIB:,.1f} MiB after")
    if problems := missing_libraries(site, removed):
        sys.stderr.write("\n".join(problems) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
