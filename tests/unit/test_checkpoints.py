"""Test checkpoints without a model: committing, pruning, finding the newest, and a failing store."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from lora_trainer.config import CheckpointConfig
from lora_trainer.errors import Interrupted, StorageError
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.signals import Interruption
from lora_trainer.store.checkpoints import Checkpoints, checkpoint_name
from lora_trainer.store.interface import Storage
from lora_trainer.store.local import FileStorage
from lora_trainer.store.manifest import MANIFEST_NAME
from lora_trainer.store.opening import open_storage
from lora_trainer.store.prefixes import run_prefix

RUN = run_prefix(BloodType.A, "0123456789abcdef")
PREFIX = f"{RUN}checkpoints/"


def snapshot(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "state.json").write_text(json.dumps({"step": step}))
        (folder / "adapter.safetensors").write_bytes(bytes([step]) * 100)

    return write


def opened(tmp_path: Path, name: str = "work", output: Storage | None = None, **settings: object) -> Checkpoints:
    config = CheckpointConfig.model_validate(settings)
    output = output or FileStorage(tmp_path / "out")
    return Checkpoints(config, tmp_path / name, output, RUN, "0123456789abcdef", interruption=Interruption())


def stored(tmp_path: Path) -> set[str]:
    return {item.key.removeprefix(PREFIX) for item in open_storage(f"file://{tmp_path / 'out'}").list(PREFIX)}


def test_persona_prefixes_do_not_hold_each_other() -> None:
    assert not run_prefix(BloodType.AB, "x").startswith(run_prefix(BloodType.A, "x").removesuffix("x/"))


def test_the_newest_are_kept_here_and_there_and_found_on_another_machine(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, keep=2)
    for step in (10, 20, 30):
        checkpoints.write(step, snapshot(step))
        checkpoints.finish(10)
    names = {
        f"{checkpoint_name(step)}/{name}" for step in (20, 30) for name in ("state.json", "adapter.safetensors", MANIFEST_NAME)
    }
    assert stored(tmp_path) == names
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"step-000020", "step-000030"}

    found = opened(tmp_path, "elsewhere").newest()
    assert found is not None
    assert json.loads((found / "state.json").read_text()) == {"step": 30}
    assert found.parent == tmp_path / "elsewhere"


def test_none_is_none(tmp_path: Path) -> None:
    assert opened(tmp_path).newest() is None


@pytest.mark.parametrize("damage", ["missing file", "flipped byte", "no manifest", "manifest cut off"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoints = opened(tmp_path, keep=3)
    for step in (1, 2):
        checkpoints.write(step, snapshot(step))
        checkpoints.finish(10)
    folder = tmp_path / "out" / PREFIX / checkpoint_name(2)
    match damage:
        case "missing file":
            (folder / "state.json").unlink()
        case "flipped byte":
            (folder / "adapter.safetensors").write_bytes(bytes([3]) + bytes([2]) * 99)
        case "no manifest":
            (folder / MANIFEST_NAME).unlink()
        case _:
            (folder / MANIFEST_NAME).write_text('{"schema": 1, "files"')
    found = opened(tmp_path, "elsewhere").newest()
    assert found is not None
    assert found.name == checkpoint_name(1)
    # on the same machine, the job uses the local copy
    here = opened(tmp_path).newest()
    assert here is not None
    assert here.name == checkpoint_name(2)


def test_due_after_steps_or_minutes(tmp_path: Path) -> None:
    by_step = opened(tmp_path, every_steps=5, every_minutes=1440)
    assert [step for step in range(1, 8) if by_step.is_due(step)] == [5, 6, 7]
    by_step.continue_from(6)
    assert not by_step.is_due(10)
    assert by_step.is_due(11)
    by_time = opened(tmp_path, every_steps=0, every_minutes=1e-9)
    assert by_time.is_due(1)
    assert not opened(tmp_path, every_steps=0, every_minutes=1440).is_due(10**6)


class SlowStorage(FileStorage):
    """A storage that blocks the first upload until the test releases it."""

    begun, go_on = threading.Event(), threading.Event()

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        self.begun.set()
        assert self.go_on.wait(20)
        super().upload(path, key)


def test_training_never_waits_and_of_those_that_wait_the_newest_is_next(tmp_path: Path) -> None:
    SlowStorage.begun, SlowStorage.go_on = threading.Event(), threading.Event()
    checkpoints = opened(tmp_path, output=SlowStorage(tmp_path / "out"), keep=10)
    checkpoints.write(1, snapshot(1))
    assert SlowStorage.begun.wait(20)
    for step in (2, 3, 4):
        checkpoints.write(step, snapshot(step))
    with pytest.raises(StorageError, match=r"step-000004: the checkpoint was not uploaded: still uploading after 0 s"):
        checkpoints.finish(0.01)
    SlowStorage.go_on.set()
    checkpoints.finish(20)
    assert {name.partition("/")[0] for name in stored(tmp_path)} == {"step-000001", "step-000004"}


class CopyingStorage(FileStorage):
    """A storage that copies its own objects, as S3 does, and notes what is sent to it."""

    sent: list[str]

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        self.sent.append(key.removeprefix(PREFIX))
        super().upload(path, key)

    def copy(self, source: str, key: str, *, size_bytes: int, sha256: str) -> bool:
        found = self.read_bytes(source)
        if found:
            self.write_bytes(key, found.data)
        return found is not None


def test_bytes_that_the_store_has_are_not_sent_again(tmp_path: Path) -> None:
    def best_of(step: int, best: int) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            snapshot(step)(folder)
            (folder / "best_adapter.safetensors").write_bytes(bytes([best]) * 100)

        return write

    output = CopyingStorage(tmp_path / "out")
    output.sent = []
    checkpoints = opened(tmp_path, output=output, keep=1)
    # the best step is that of the checkpoint itself, then stays the best one, then another step is
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 3)):
        checkpoints.write(step, best_of(step, best))
        checkpoints.finish(10)
        found = opened(tmp_path, f"elsewhere{step}").newest()
        assert found is not None
        assert (found / "best_adapter.safetensors").read_bytes() == bytes([best]) * 100
    assert [key for key in output.sent if "best" in key] == []
    # a checkpoint that is gone is no source
    (tmp_path / "out" / PREFIX / checkpoint_name(4) / "best_adapter.safetensors").unlink()
    checkpoints.write(5, best_of(5, 3))
    checkpoints.finish(10)
    assert [key for key in output.sent if "best" in key] == ["step-000005/best_adapter.safetensors"]


class FullStorage(FileStorage):
    """A storage that rejects every write until the test releases it."""

    full = True

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        if self.full:
            raise StorageError("s3://bucket/: no space left")
        super().upload(path, key)


def test_a_store_that_refuses_stops_no_training_and_the_last_word_says_where_it_is_kept(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, output=FullStorage(tmp_path / "out"))
    checkpoints.write(1, snapshot(1))
    with pytest.raises(StorageError, match=r"not uploaded: s3://bucket/: no space left; it is kept in .*step-000001") as caught:
        checkpoints.finish(10)
    assert caught.value.exit_code == 6
    assert stored(tmp_path) == set()
    FullStorage.full = False
    try:
        checkpoints.write(2, snapshot(2))
        checkpoints.finish(10)
    finally:
        FullStorage.full = True
    assert f"{checkpoint_name(2)}/{MANIFEST_NAME}" in stored(tmp_path)


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    def no_space(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    checkpoints = opened(tmp_path)
    checkpoints.write(1, no_space)
    with pytest.raises(StorageError, match=r"No space left on device; free some space .* could not be written to work_dir either"):
        checkpoints.finish(10)


def test_clear_leaves_nothing(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    checkpoints.write(1, snapshot(1))
    checkpoints.clear()
    assert stored(tmp_path) == set()
    assert not (tmp_path / "work").exists()
    assert checkpoints.newest() is None


def test_leaving_for_a_signal_waits_for_the_upload_and_says_what_is_kept(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    checkpoints.write(7, snapshot(7))
    interrupted = Interrupted("SIGTERM")
    with pytest.raises(Interrupted), checkpoints:
        raise interrupted
    assert interrupted.kept == "the checkpoint of step 7 is safe"
    assert f"{checkpoint_name(7)}/{MANIFEST_NAME}" in stored(tmp_path)


def test_a_signal_waits_for_the_end_of_a_deferred_block() -> None:
    interruption = Interruption()
    reached = []

    def block() -> None:
        with interruption.deferred():
            with interruption.deferred():
                interruption._handle(signal.SIGTERM, None)
            reached.append("behind the inner block")
        reached.append("behind the outer block")

    with pytest.raises(Interrupted, match="SIGTERM"):
        block()
    assert reached == ["behind the inner block"]
    assert interruption.seconds_ago > 0
    with pytest.raises(Interrupted):
        interruption.check()


def test_outside_a_deferred_block_it_is_raised_at_once() -> None:
    interruption = Interruption()
    interruption.check()
    assert interruption.seconds_ago == 0
    with pytest.raises(Interrupted, match="SIGINT"):
        interruption._handle(signal.SIGINT, None)


def swallow(interruption: Interruption) -> None:
    """Turn the interruption into an ImportError, as C code does during an import."""
    try:
        interruption._handle(signal.SIGTERM, None)
    except BaseException as error:
        raise ImportError("numpy failed to import") from error


def test_what_a_library_makes_of_a_signal_is_taken_for_the_signal() -> None:
    interruption = Interruption()
    with pytest.raises(Interrupted, match="SIGTERM"), interruption.recognised():
        swallow(interruption)


def test_what_has_no_signal_or_says_what_is_lost_stays_what_it_is() -> None:
    interruption = Interruption()
    with pytest.raises(ImportError), interruption.recognised():
        raise ImportError("numpy failed to import")
    with suppress(Interrupted):
        interruption._handle(signal.SIGTERM, None)
    with pytest.raises(StorageError, match="is not uploaded"), interruption.recognised():
        raise StorageError("the checkpoint is not uploaded")
