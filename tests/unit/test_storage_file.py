from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_contract import UNSAFE, StorageContract, keys

from lora_trainer.errors import ConfigError, ExitCode, LoraTrainerError, StorageError
from lora_trainer.store.interface import NotFound, PreconditionFailed, Storage
from lora_trainer.store.keys import safe_key, split_uri
from lora_trainer.store.local import FileStorage, local_errors, sha256_of
from lora_trainer.store.opening import open_storage
from lora_trainer.store.s3 import S3Storage


class TestFileStorage(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return open_storage(f"file://{tmp_path}/store/")

    def test_plain_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for uri in (
            "outputs",
            "outputs/",
            "./outputs/../outputs",
            f"file://{tmp_path}/outputs",
            f"file://localhost{tmp_path}/outputs/",
        ):
            storage = open_storage(uri)
            assert storage.uri == f"file://{tmp_path}/outputs/"
            assert storage.local_folder == tmp_path / "outputs"
        assert not (tmp_path / "outputs").exists()

    def test_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/someone")
        assert open_storage("~/outputs").uri == "file:///home/someone/outputs/"

    def test_uri_names_the_same_folder_again(self, tmp_path: Path) -> None:
        for name in ("한글 폴더", "100%", "a%20b", "a#b?c"):
            storage = FileStorage(tmp_path / name)
            assert open_storage(storage.uri).local_folder == tmp_path / name
        assert open_storage("file:///").uri == "file:///"

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "train.jsonl").touch()
        with pytest.raises(ConfigError, match=r"train\.jsonl: got a file, expected a folder"):
            open_storage(str(tmp_path / "train.jsonl"))

    def test_file_in_the_way_of_a_folder(self, storage: Storage) -> None:
        storage.write_bytes("runs", b"")
        with pytest.raises(ConfigError, match="runs: got a file where a folder is expected"):
            storage.write_bytes("runs/A/x", b"")

    def test_folder_in_the_way_of_a_file(self, storage: Storage, tmp_path: Path) -> None:
        storage.write_bytes("runs/A/x", b"")
        with pytest.raises(ConfigError, match="A: got a folder where a file is expected"):
            storage.write_bytes("runs/A", b"")
        assert sorted(path.name for path in (tmp_path / "store" / "runs").iterdir()) == ["A"]

    def test_links_to_files_are_listed_and_links_to_folders_are_not(self, storage: Storage, tmp_path: Path) -> None:
        storage.write_bytes("adapters/A/1/x", b"xyz")
        folder = tmp_path / "store"
        (folder / "adapter_A").symlink_to(folder / "adapters" / "A" / "1")
        (folder / "link").symlink_to(folder / "adapters" / "A" / "1" / "x")
        (folder / "dangling").symlink_to(folder / "nowhere")
        assert [(found.key, found.size_bytes) for found in storage.list("")] == [("adapters/A/1/x", 3), ("link", 3)]

    def test_lock_and_temporary_files_are_not_listed(self, storage: Storage, tmp_path: Path) -> None:
        storage.write_bytes("A/latest.json", b"{}", if_absent=True)
        # an object that clients only create and never replace, such as a manifest, has no lock file
        assert len(list((tmp_path / "store" / "A").iterdir())) == 1
        found = storage.read_bytes("A/latest.json")
        assert found is not None
        storage.write_bytes("A/latest.json", b"{}", if_match=found.etag)
        assert len(list((tmp_path / "store" / "A").iterdir())) == 2
        assert keys(storage) == ["A/latest.json"]

    def test_made_anew_where_the_file_system_has_no_links(
        self, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_links(self: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(Path, "hardlink_to", no_links)
        storage.write_bytes("x", b"1", if_absent=True)
        with pytest.raises(PreconditionFailed):
            storage.write_bytes("x", b"2", if_absent=True)
        assert (tmp_path / "store" / "x").read_bytes() == b"1"

    def test_made_anew_below_a_file(self, storage: Storage) -> None:
        storage.write_bytes("x", b"")
        with pytest.raises(ConfigError, match="x: got a file where a folder is expected"):
            storage.write_bytes("x/y", b"", if_absent=True)

    def test_leftovers_of_a_killed_process_go_after_an_hour(self, storage: Storage, tmp_path: Path) -> None:
        storage.write_bytes("x", b"")
        old, recent = tmp_path / "store" / ".~lora-trainer.0.tmp", tmp_path / "store" / ".~lora-trainer.1.tmp"
        old.touch()
        recent.touch()
        os.utime(old, (0, 0))
        storage.write_bytes("x", b"")
        assert not old.exists()
        assert recent.exists()

    def test_names_that_are_no_keys_are_reported(self, storage: Storage, tmp_path: Path) -> None:
        storage.write_bytes("x", b"")
        (tmp_path / "store" / "a\\b").touch()
        with pytest.raises(StorageError, match="backslash"):
            keys(storage)

    def test_readers_never_see_half_a_write(self, storage: Storage) -> None:
        whole = {b"a" * 500_000, b"b" * 500_000}
        storage.write_bytes("x", b"a" * 500_000)
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                for data in whole:
                    storage.write_bytes("x", data)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            seen = {read.data for read in (storage.read_bytes("x") for _ in range(100)) if read}
        finally:
            stop.set()
            writer.join()
        assert seen <= whole


def test_two_storages_share_the_lock(tmp_path: Path) -> None:
    """Processes that refer to the folder by different paths still exclude each other."""
    outer, inner = open_storage(str(tmp_path)), open_storage(str(tmp_path / "A"))
    outer.write_bytes("A/n", b"0")

    def count(storage: Storage, key: str) -> None:
        done = 0
        while done < 20:
            read = storage.read_bytes(key)
            assert read is not None
            try:
                storage.write_bytes(key, str(int(read.data) + 1).encode(), if_match=read.etag)
            except PreconditionFailed:
                continue
            done += 1

    threads = [threading.Thread(target=count, args=pair) for pair in ((outer, "A/n"), (inner, "n"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read = inner.read_bytes("n")
    assert read is not None
    assert read.data == b"40"


@pytest.mark.parametrize(
    ("number", "kind", "exit_code", "advice"),
    [
        (errno.ENOSPC, StorageError, ExitCode.STORAGE, "free some space"),
        (errno.EDQUOT, StorageError, ExitCode.STORAGE, "free some space"),
        (errno.EACCES, StorageError, ExitCode.STORAGE, "as uid"),
        (errno.EROFS, StorageError, ExitCode.STORAGE, "as uid"),
        (errno.EIO, StorageError, ExitCode.STORAGE, "check the disk"),
        (errno.ENOENT, NotFound, ExitCode.DATA, "check the path"),
        (errno.ENOTDIR, ConfigError, ExitCode.CONFIG, "folder is expected"),
    ],
)
def test_what_a_disk_may_say(number: int, kind: type[LoraTrainerError], exit_code: ExitCode, advice: str) -> None:
    with pytest.raises(kind) as caught, local_errors(Path("/data/x")):
        raise OSError(number, os.strerror(number), "/data/.~lora-trainer.0.tmp")
    assert type(caught.value) is kind
    assert caught.value.exit_code == exit_code
    assert str(caught.value).startswith("/data/x: ")
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "folder", "key"),
    [
        ("s3://bkt/p/train.jsonl", "s3://bkt/p/", "train.jsonl"),
        ("s3://bkt/train.jsonl", "s3://bkt/", "train.jsonl"),
        ("s3://bkt/p%20q/a%20b", "s3://bkt/p%20q/", "a%20b"),
        ("file:///data/a%20b.jsonl", "file:///data/", "a b.jsonl"),
        ("file:///x.jsonl", "file:///", "x.jsonl"),
        ("data/x.jsonl", "data/", "x.jsonl"),
        ("/x.jsonl", "/", "x.jsonl"),
        ("x.jsonl", "./", "x.jsonl"),
    ],
)
def test_split_uri(uri: str, folder: str, key: str) -> None:
    assert split_uri(uri) == (folder, key)
    open_storage(folder)


@pytest.mark.parametrize("uri", ["s3://bkt", "s3://bkt/", "s3://bkt/p/", "file:///", "data/", "", "s3://bkt/..", "x\\y"])
def test_split_uri_wants_an_object(uri: str) -> None:
    with pytest.raises(ConfigError):
        split_uri(uri)


@pytest.mark.parametrize(
    ("uri", "canonical"),
    [("s3://bucket", "s3://bucket/"), ("s3://bucket/p", "s3://bucket/p/"), ("s3://bucket/p/q%20/", "s3://bucket/p/q%20/")],
)
def test_s3_uris(uri: str, canonical: str) -> None:
    storage = open_storage(uri)
    assert isinstance(storage, S3Storage)
    assert storage.uri == canonical
    assert storage.local_folder is None


@pytest.mark.parametrize(
    "uri", ["s3://", "s3:///p/", "s3://b?/p/", "s3://bucket//p/", "s3://bucket/../p/", "gs://b/p/", "file://host/p/", "file://p"]
)
def test_uris_that_name_no_folder(uri: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        open_storage(uri)


@pytest.mark.parametrize("key", UNSAFE)
def test_unsafe_keys(key: str) -> None:
    with pytest.raises(ValueError, match="unsafe key"):
        safe_key(key)


@given(st.text(max_size=20) | st.text("./\\a\0", max_size=8))
def test_a_safe_key_stays_inside_its_folder(key: str) -> None:
    try:
        safe_key(key)
    except ValueError:
        return
    path = os.path.normpath(f"/store/{key}")
    assert path == f"/store/{key}"
    assert path.startswith("/store/")


def test_sha256_of(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(NotFound):
        sha256_of(tmp_path / "nowhere")
