"""Test the remembered hashes of a base: what is not read again, what is, and that the identity never depends on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_trainer.base_files import remembered
from lora_trainer.base_files.remembered import RECORD_NAME, hash_files
from lora_trainer.base_model import identify_base
from lora_trainer.config import BaseModelConfig, RunConfig
from lora_trainer.config_sources import settle
from lora_trainer.run.job import ProcessContext
from lora_trainer.store.local import FileStorage, sha256_of

REPOSITORY = Path(__file__).resolve().parents[2]
WEIGHTS = "model.safetensors"
WEIGHTS_BYTES = 2**22
COUNTERS = Path("/proc/self/io")

pytestmark = pytest.mark.skipif(not COUNTERS.exists(), reason="the kernel does not count reads here: no /proc/self/io")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text('{"model": {}}')
    (path / WEIGHTS).write_bytes(bytes(range(256)) * (WEIGHTS_BYTES // 256))
    return path


@pytest.fixture(autouse=True)
def any_size_and_age(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "SETTLED_S", 0.0)
    monkeypatch.setattr(remembered, "MIN_REMEMBERED_BYTES", 0)


def bytes_read() -> int:
    """Return how many bytes this process has read so far, as counted by the kernel."""
    return int(COUNTERS.read_text().split()[1])


def identify(folder: Path, work_dir: Path | None = None, *, read_all: bool = False) -> tuple[str, bool]:
    """Return the identity, and whether the weights were read."""
    before = bytes_read()
    identity = identify_base(BaseModelConfig(model=str(folder)), None, work_dir, read_all=read_all).identity
    return identity, bytes_read() - before >= WEIGHTS_BYTES


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def rewrite(path: Path) -> None:
    """Change one byte and restore the modification time, until the clock of change times has moved on."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        with path.open("r+b") as file:
            file.write(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def test_an_unchanged_base_is_not_read_again(folder: Path) -> None:
    identity, was_read = identify(folder)
    assert was_read
    assert identify(folder) == (identity, False)
    (folder / RECORD_NAME).unlink()
    assert identify(folder) == (identity, True), "the identity is the same with and without a record"


def test_the_record_is_no_part_of_the_base(folder: Path, tmp_path: Path) -> None:
    identity, _ = identify(folder)
    assert RECORD_NAME in names_in(folder)
    assert RECORD_NAME not in [item.key for item in FileStorage(folder).list("")], "a listing is what an upload sends"
    shutil.copytree(folder, tmp_path / "copy")
    # the copy's files have other inodes, so the copied record says nothing about them
    assert identify(tmp_path / "copy") == (identity, True)
    assert identify(tmp_path / "copy") == (identity, False)


def test_a_changed_byte_with_the_old_size_and_time_is_noticed(folder: Path) -> None:
    identity, _ = identify(folder)
    rewrite(folder / WEIGHTS)
    changed, was_read = identify(folder)
    assert was_read
    assert changed != identity
    assert identify(folder) == (changed, False)


def test_only_changed_files_are_read(folder: Path) -> None:
    identity, _ = identify(folder)
    (folder / "config.json").write_text('{"a": 1}')
    changed, was_read = identify(folder)
    assert changed != identity
    assert not was_read
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    assert identify(folder)[0] != changed


@pytest.mark.parametrize("field", ["path", "size", "mtime_ns", "ctime_ns", "inode", "device"])
def test_every_part_of_a_files_state_counts(folder: Path, field: str) -> None:
    identity, _ = identify(folder)
    record = json.loads((folder / RECORD_NAME).read_text())
    entry = record["files"][WEIGHTS]
    entry[field] = "/elsewhere" if field == "path" else entry[field] + 1
    entry["sha256"] = "0" * 64
    (folder / RECORD_NAME).write_text(json.dumps(record))
    assert identify(folder) == (identity, True)
    assert identify(folder) == (identity, False)


def damaged(entry: object) -> bytes:
    return json.dumps({"version": 1, "files": {WEIGHTS: entry}}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff", b"[]", b"null", b'{"version": 1, "files": {"model.saf', b'{"version": 1, "files": []}', b'{"files": {}}',
        b"[" * 100_000, b" " * 2**21, damaged(None), damaged([]), damaged({}), damaged({"sha256": 1}),
    ],
)  # fmt: skip
def test_a_broken_or_foreign_record_is_rewritten(folder: Path, data: bytes) -> None:
    identity, _ = identify(folder)
    (folder / RECORD_NAME).write_bytes(data)
    assert identify(folder) == (identity, True)
    assert identify(folder) == (identity, False)


@pytest.mark.parametrize("sha256", [None, 1, "", "0" * 63, "0" * 64 + "\n", "G" * 64])
def test_a_record_whose_hash_is_none(folder: Path, sha256: object) -> None:
    identity, _ = identify(folder)
    record = json.loads((folder / RECORD_NAME).read_text())
    record["files"][WEIGHTS]["sha256"] = sha256
    (folder / RECORD_NAME).write_text(json.dumps(record))
    assert identify(folder) == (identity, True)


def test_a_record_of_another_version_is_ignored(folder: Path) -> None:
    identity, _ = identify(folder)
    record = json.loads((folder / RECORD_NAME).read_text())
    (folder / RECORD_NAME).write_text(json.dumps({**record, "version": 2}))
    assert identify(folder) == (identity, True)


def test_a_file_that_was_just_written_is_not_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "SETTLED_S", 3600.0)
    identity, _ = identify(folder)
    assert not (folder / RECORD_NAME).exists()
    os.utime(folder / WEIGHTS, (0, 0))
    assert identify(folder) == (identity, True), "the change time counts as well"
    assert not (folder / RECORD_NAME).exists()


def test_a_modification_time_in_the_future_is_not_trusted(folder: Path) -> None:
    os.utime(folder / WEIGHTS, (2**32, 2**32))
    identity, _ = identify(folder)
    assert identify(folder) == (identity, True)
    assert set(json.loads((folder / RECORD_NAME).read_text())["files"]) == {"config.json", "tokenizer.json"}


def test_fresh_reads_the_base_again(folder: Path, tmp_path: Path) -> None:
    identity, _ = identify(folder)
    record = json.loads((folder / RECORD_NAME).read_text())
    record["files"][WEIGHTS]["sha256"] = "0" * 64
    (folder / RECORD_NAME).write_text(json.dumps(record))
    assert identify(folder)[0] != identity, "a record is believed, as the folder is: the same users can write to both"
    assert identify(folder, read_all=True) == (identity, True)
    assert identify(folder) == (identity, False)


def test_a_run_passes_its_work_folder_and_fresh(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(REPOSITORY / "examples" / "tiny-base", base, ignore=shutil.ignore_patterns(".*"))
    # a folder of that name cannot be replaced by a file, whoever tries
    (base / RECORD_NAME).mkdir()
    config: RunConfig = settle({"blood_type": "A", "base.model": str(base), "work_dir": str(tmp_path / "work")}, {})
    identity = ProcessContext().base(config).identity
    (place,) = (tmp_path / "work" / "base-hashes").iterdir()
    record = json.loads(place.read_text())
    record["files"][WEIGHTS]["sha256"] = "0" * 64
    place.write_text(json.dumps(record))
    assert ProcessContext().base(config).identity != identity
    assert ProcessContext(fresh=True).base(config).identity == identity
    assert ProcessContext().base(config).identity == identity


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    """The hub's cache keeps its files apart from a snapshot's folder."""
    blob = tmp_path / "blob"
    (folder / WEIGHTS).rename(blob)
    (folder / WEIGHTS).symlink_to(blob)
    identity, _ = identify(folder)
    assert identify(folder) == (identity, False)
    rewrite(blob)
    assert identify(folder)[0] != identity


def test_nothing_is_written_beside_a_small_base(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MIN_REMEMBERED_BYTES", size_of(folder) + 1)
    identity, _ = identify(folder, tmp_path / "work")
    assert identify(folder, tmp_path / "work") == (identity, True)
    assert RECORD_NAME not in names_in(folder)
    assert not (tmp_path / "work").exists()
    monkeypatch.setattr(remembered, "MIN_REMEMBERED_BYTES", size_of(folder))
    assert identify(folder) == (identity, True)
    assert identify(folder) == (identity, False)


def test_the_hashes_are_those_of_the_files(folder: Path) -> None:
    files = sorted(folder.iterdir())
    expected = [sha256_of(path) for path in files]
    assert hash_files(folder, files) == expected
    assert hash_files(folder, files) == expected


READ_ONLY = """
import subprocess, sys
from pathlib import Path
from lora_trainer.base_files import remembered
from lora_trainer.base_model import identify_base
from lora_trainer.config import BaseModelConfig

remembered.SETTLED_S, remembered.MIN_REMEMBERED_BYTES = 0.0, 0
folder, work_dir = map(Path, sys.argv[1:])
subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
for place in (None, work_dir, work_dir, folder / "read-only-too"):
    before = int(Path("/proc/self/io").read_text().split()[1])
    identity = identify_base(BaseModelConfig(model=str(folder)), None, place).identity
    print(identity, int(Path("/proc/self/io").read_text().split()[1]) - before >= 2**22)
"""


def test_a_read_only_base(folder: Path, tmp_path: Path) -> None:
    apart = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c"]
    if not shutil.which("unshare") or subprocess.run([*apart, ""], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces are not allowed here")
    done = subprocess.run(
        [*apart, READ_ONLY, str(folder), str(tmp_path / "work")], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    identity = identify(folder)[0]
    assert done.stdout.splitlines() == [f"{identity} {was_read}" for was_read in (True, True, False, True)]


TOGETHER = """
import sys
from pathlib import Path
from lora_trainer.base_files import remembered
from lora_trainer.base_model import identify_base
from lora_trainer.config import BaseModelConfig

remembered.SETTLED_S, remembered.MIN_REMEMBERED_BYTES = 0.0, 0
print("ready", flush=True)
sys.stdin.readline()
found = set()
for number in range(30):
    found.add(identify_base(BaseModelConfig(model=sys.argv[1]), read_all=number % 2 == 0).identity)
print(*found)
"""


@pytest.fixture
def two_processes(folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-c", TOGETHER, str(folder)]
    started = [
        subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_two_jobs_at_once(folder: Path, two_processes: list[subprocess.Popen[str]]) -> None:
    names = names_in(folder) | {RECORD_NAME}
    for process in two_processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in two_processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = {process.communicate()[0].strip() for process in two_processes}
    assert [process.returncode for process in two_processes] == [0, 0]
    assert identify(folder) == (found.pop(), False)
    assert not found
    assert names_in(folder) == names, "no temporary file stays"
