"""The contract that both kinds of storage must fulfil. Each subclass provides the fixture `storage`."""

from __future__ import annotations

import hashlib
import os
import resource
import threading
from pathlib import Path

import pytest

from lora_trainer.errors import ExitCode, StorageError
from lora_trainer.store.interface import NotFound, PreconditionFailed, Storage

KEY = "runs/A/manifest.json"
UNSAFE = ["", "/etc/passwd", "a/../b", "..", "a//b", "a/", "./a", "a\\b", "a\0b", "a\nb", "\udcff"]


def keys(storage: Storage, prefix: str = "") -> list[str]:
    return [found.key for found in storage.list(prefix)]


class StorageContract:
    @pytest.mark.parametrize("size_bytes", [0, 1, 100_000])
    def test_file_round_trip(self, storage: Storage, tmp_path: Path, size_bytes: int) -> None:
        data = os.urandom(size_bytes)
        source, target = tmp_path / "source", tmp_path / "new" / "folder" / "target"
        source.write_bytes(data)
        storage.upload(source, KEY)
        fetched = storage.download(KEY, target)
        assert target.read_bytes() == data
        assert (fetched.size_bytes, fetched.sha256) == (size_bytes, hashlib.sha256(data).hexdigest())
        assert [path.name for path in target.parent.iterdir()] == ["target"]

    def test_a_folder_is_uploaded_by_what_is_named(self, storage: Storage, tmp_path: Path) -> None:
        files = {"a.bin": os.urandom(100_000), "empty": b"", "b/c.json": b"{}", "not-named": b"x"}
        for name, data in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
        named = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != "not-named"}
        storage.upload_all(tmp_path, "runs/A/", named)
        assert keys(storage, "runs/A/") == ["runs/A/a.bin", "runs/A/b/c.json", "runs/A/empty"]
        for name in named:
            assert storage.download(f"runs/A/{name}", tmp_path / "target").sha256 == named[name]

    def test_a_folder_without_a_file_that_is_named(self, storage: Storage, tmp_path: Path) -> None:
        (tmp_path / "there").write_bytes(b"x")
        with pytest.raises(NotFound, match="missing"):
            storage.upload_all(tmp_path, "", dict.fromkeys(("missing", "there"), "0" * 64))

    def test_download_and_upload_replace(self, storage: Storage, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        target.write_text("old")
        for text in ("first, and longer", "second"):
            source.write_text(text)
            storage.upload(source, KEY)
            storage.download(KEY, target)
            assert target.read_text() == text

    def test_downloaded_file_has_the_usual_mode(self, storage: Storage, tmp_path: Path) -> None:
        usual = tmp_path / "usual"
        usual.touch()
        storage.write_bytes(KEY, b"x")
        storage.download(KEY, tmp_path / "target")
        assert (tmp_path / "target").stat().st_mode == usual.stat().st_mode

    def test_korean_and_odd_keys(self, storage: Storage) -> None:
        odd = ["a b+c.json", "data/한국어 파일.jsonl", "p%20q/100%.json", "q?x=1#y", "step-000120/~tmp"]
        for key in odd:
            storage.write_bytes(key, key.encode())
        assert keys(storage) == sorted(odd, key=str.encode)
        for key in odd:
            read = storage.read_bytes(key)
            assert read is not None
            assert read.data == key.encode()

    def test_missing_key(self, storage: Storage, tmp_path: Path) -> None:
        storage.write_bytes("data/train_data_type_A.jsonl", b"{}")
        storage.write_bytes("data/notes.txt", b"")
        assert storage.read_bytes("data/train_data_type_B.jsonl") is None
        assert not storage.exists("data/train_data_type_B.jsonl")
        with pytest.raises(NotFound) as caught:
            storage.download("data/train_data_type_B.jsonl", tmp_path / "target")
        assert caught.value.exit_code == ExitCode.DATA
        message = str(caught.value)
        assert "data/train_data_type_B.jsonl: not found" in message
        assert "nearest names" in message
        assert "train_data_type_A.jsonl" in message
        assert "notes.txt" not in message
        assert list(tmp_path.glob("target*")) == []

    def test_missing_key_in_an_empty_folder(self, storage: Storage, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match=r"no files in .*data/; check the folder"):
            storage.download("data/train.jsonl", tmp_path / "target")

    def test_missing_file_to_upload(self, storage: Storage, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match="nowhere: no such file"):
            storage.upload(tmp_path / "nowhere", KEY)
        assert not storage.exists(KEY)

    def test_failed_download_leaves_the_target_alone(self, storage: Storage, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_text("old")
        with pytest.raises(NotFound):
            storage.download(KEY, target)
        assert target.read_text() == "old"

    def test_disk_that_takes_no_more(self, storage: Storage, tmp_path: Path) -> None:
        storage.write_bytes(KEY, b"x" * 3_000_000)
        target = tmp_path / "target"
        target.write_text("old")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            with pytest.raises(StorageError, match=r"target: .*check the disk"):
                storage.download(KEY, target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert target.read_text() == "old"
        assert list(tmp_path.glob(".~*")) == []

    def test_a_prefix_is_not_its_longer_neighbour(self, storage: Storage) -> None:
        for key in ("adapters/A/1/x", "adapters/AB/1/x", "adapters/A.json"):
            storage.write_bytes(key, b"")
        assert keys(storage, "adapters/A/") == ["adapters/A/1/x"]
        for prefix in ("adapters/A", "/", "adapters/../", "a//"):
            with pytest.raises(ValueError, match=r"prefix|unsafe"):
                storage.list(prefix)

    def test_a_folder_is_no_object(self, storage: Storage, tmp_path: Path) -> None:
        storage.write_bytes("adapters/A/x", b"")
        assert not storage.exists("adapters/A")
        assert storage.read_bytes("adapters/A") is None
        assert storage.read_bytes("adapters/A/x/deeper") is None
        assert not storage.exists("adapters/A/x/deeper")
        with pytest.raises(NotFound):
            storage.download("adapters/A", tmp_path / "target")

    def test_delete(self, storage: Storage) -> None:
        for key in ("runs/A/x", "runs/AB/x"):
            storage.write_bytes(key, b"x")
        storage.delete("runs/A/x")
        # deleting a missing key is a no-op, as in S3
        storage.delete("runs/A/x")
        storage.delete("runs/AB")
        assert keys(storage) == ["runs/AB/x"]
        assert storage.read_bytes("runs/A/x") is None

    def test_listing_is_sorted_by_bytes_and_sized(self, storage: Storage) -> None:
        expected = ["a-b", "a.txt", "a/b", "a/b-c/d", "a/b/c", "a0", "가/나", "Z"]
        # on a disk, a name cannot be both a file and a folder
        expected.remove("a/b")
        for key in expected:
            storage.write_bytes(key, b"x" * len(key))
        assert [(found.key, found.size_bytes) for found in storage.list("")] == [
            (key, len(key)) for key in sorted(expected, key=str.encode)
        ]
        assert keys(storage, "nothing/here/") == []

    @pytest.mark.parametrize("key", UNSAFE)
    def test_unsafe_keys_are_refused_by_everything(self, storage: Storage, tmp_path: Path, key: str) -> None:
        source = tmp_path / "source"
        source.touch()
        for call in (
            lambda: storage.download(key, tmp_path / "target"),
            lambda: storage.upload(source, key),
            lambda: storage.read_bytes(key),
            lambda: storage.write_bytes(key, b""),
            lambda: storage.exists(key),
            lambda: storage.delete(key),
        ):
            with pytest.raises(ValueError, match="unsafe key"):
                call()

    def test_a_range_is_exact_or_an_error(self, storage: Storage) -> None:
        storage.write_bytes("base/weights", bytes(range(100)))
        for start, length in ((0, 8), (8, 50), (99, 1), (0, 100), (5, 0)):
            assert storage.read_range("base/weights", start, length) == bytes(range(100))[start : start + length]
        for start, length in ((90, 11), (100, 1), (0, 101)):
            with pytest.raises(StorageError):
                storage.read_range("base/weights", start, length)
        with pytest.raises(NotFound):
            storage.read_range("base/nothing", 0, 1)

    def test_read_bytes_is_bounded(self, storage: Storage) -> None:
        storage.write_bytes(KEY, b"x" * 11)
        with pytest.raises(StorageError, match="more than 10 bytes"):
            storage.read_bytes(KEY, max_bytes=10)
        assert storage.read_bytes(KEY, max_bytes=11) is not None

    def test_compare_and_swap(self, storage: Storage) -> None:
        storage.write_bytes(KEY, b"1", if_absent=True)
        with pytest.raises(PreconditionFailed):
            storage.write_bytes(KEY, b"2", if_absent=True)
        first = storage.read_bytes(KEY)
        assert first is not None
        storage.write_bytes(KEY, b"2", if_match=first.etag)
        with pytest.raises(PreconditionFailed):
            storage.write_bytes(KEY, b"3", if_match=first.etag)
        with pytest.raises(PreconditionFailed):
            storage.write_bytes("not/there", b"3", if_match=first.etag)
        with pytest.raises(ValueError, match="exclude each other"):
            storage.write_bytes(KEY, b"3", if_match=first.etag, if_absent=True)
        second = storage.read_bytes(KEY)
        assert second is not None
        assert second.data == b"2"
        assert not storage.exists("not/there")

    def test_no_update_is_lost_in_a_race(self, storage: Storage) -> None:
        writers, each = 4, 5
        wins: list[int] = []

        def count() -> None:
            done = 0
            while done < each:
                read = storage.read_bytes(KEY)
                try:
                    if read is None:
                        storage.write_bytes(KEY, b"1", if_absent=True)
                    else:
                        storage.write_bytes(KEY, str(int(read.data) + 1).encode(), if_match=read.etag)
                except PreconditionFailed:
                    continue
                done += 1
            wins.append(done)

        threads = [threading.Thread(target=count) for _ in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        read = storage.read_bytes(KEY)
        assert len(wins) == writers
        assert read is not None
        assert int(read.data) == writers * each
