"""Test the base of a run: the identity of folders and hub ids, and the errors for folders and ids that are not a base."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_trainer.base_model import Base, fetch_base, identify_base, tokenizer_folder
from lora_trainer.config import BaseModelConfig
from lora_trainer.config_sources import settle
from lora_trainer.errors import ConfigError, StorageError

REPOSITORY = Path(__file__).resolve().parents[2]
COMMIT = "a09a35458c702b33eeacc393d103063234e8bc28"
FILES = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"chat_template": "x"}',
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 40,
    "model-00002-of-00002.safetensors": bytes(range(255, -1, -1)) * 40,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    path.mkdir()
    for name, data in FILES.items():
        (path / name).write_bytes(data)
    return path


def identify(folder: Path) -> str:
    return identify_base(BaseModelConfig(model=str(folder))).identity


@pytest.mark.parametrize("name", FILES)
def test_every_byte_of_a_model_file_counts(folder: Path, name: str) -> None:
    before = identify(folder)
    data = bytearray(FILES[name])
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    assert identify(folder) != before
    (folder / name).write_bytes(FILES[name])
    os.utime(folder / name, (0, 0))
    assert identify(folder) == before


def test_a_file_more_or_under_another_name_counts(folder: Path) -> None:
    before = identify(folder)
    (folder / "added_tokens.json").write_bytes(b"{}")
    assert identify(folder) != before
    (folder / "added_tokens.json").unlink()
    (folder / "generation_config.json").rename(folder / "generation_config_2.json")
    assert identify(folder) != before
    (folder / "generation_config_2.json").rename(folder / "generation_config.json")
    assert identify(folder) == before
    one, two, spare = folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors", folder / "spare"
    one.rename(spare)
    two.rename(one)
    spare.rename(two)
    assert identify(folder) != before, "the same bytes under swapped names are another model"


def test_what_is_no_part_of_the_model_does_not_count(folder: Path) -> None:
    before = identify(folder)
    (folder / "README.md").write_text("changed")
    (folder / ".mirror.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"never loaded: this format can run code")
    (folder / "original").mkdir()
    (folder / "original" / "config.json").write_text("another")
    assert identify(folder) == before


def test_the_same_files_elsewhere_are_the_same_base(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy of it")
    first, second = (identify_base(BaseModelConfig(model=str(path))) for path in (folder, tmp_path / "copy of it"))
    assert first.identity == second.identity
    assert first.identity.startswith("sha256:")
    assert len(first.identity) == len("sha256:") + 64
    assert (first.canonical_id, second.canonical_id) == ("tiny", "copy of it")
    assert identify_base(BaseModelConfig(model=f"file://{tmp_path}/copy%20of%20it")).identity == first.identity


def test_a_folder_as_a_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BaseModelConfig(model=str(folder), canonical_id="Qwen/Qwen2.5-7B-Instruct", revision=COMMIT)
    base = identify_base(config)
    assert (base.canonical_id, base.revision, base.folder) == ("Qwen/Qwen2.5-7B-Instruct", None, folder)
    assert fetch_base(base, config) == folder
    assert tokenizer_folder(config) == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder)
    for written in (f"file://{folder}", f"{folder}/", "~/tiny", "./", "../tiny"):
        found = identify_base(BaseModelConfig(model=written))
        assert (found.identity, found.canonical_id, found.folder) == (base.identity, "tiny", folder)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["config.json"], "not a model: config.json missing"),
        (["tokenizer.json"], "not a model: tokenizer.json missing"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], r"not a model: \*\.safetensors missing"),
        (list(FILES), r"not a model: config.json, tokenizer.json, \*\.safetensors missing; expected a folder as save_pretrained"),
    ],
)
def test_a_folder_with_files_missing(folder: Path, gone: list[str], said: str) -> None:
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(ConfigError, match=said):
        identify(folder)


def test_no_such_folder(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"base\.model: .*nowhere: no such folder"):
        identify(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json: got a file, expected a folder"):
        identify(folder / "config.json")
    with pytest.raises(ConfigError, match=r"nowhere: has no tokenizer\.json"):
        tokenizer_folder(BaseModelConfig(model=str(tmp_path / "nowhere")))


def test_a_file_that_cannot_be_read(folder: Path) -> None:
    weights = folder / "model-00001-of-00002.safetensors"
    weights.unlink()
    # reading a process's memory at address 0 fails even for root
    weights.symlink_to("/proc/self/mem")
    if not weights.is_file():
        pytest.skip("/proc is not there: no file that root cannot read")
    with pytest.raises(StorageError, match=r"model-00001-of-00002\.safetensors: .*check the disk"):
        identify(folder)


def test_a_hub_id_is_its_commit_and_asks_nobody() -> None:
    base = identify_base(BaseModelConfig())
    assert base == Base("Qwen/Qwen2.5-7B-Instruct", COMMIT, f"Qwen/Qwen2.5-7B-Instruct@{COMMIT}", None)
    named = identify_base(BaseModelConfig(model="me/mirror", canonical_id="Qwen/Qwen2.5-7B-Instruct"))
    assert (named.canonical_id, named.identity) == ("Qwen/Qwen2.5-7B-Instruct", f"me/mirror@{COMMIT}")


def test_a_hub_id_without_a_commit() -> None:
    with pytest.raises(ConfigError, match=r"base\.revision: not given for the hub id Qwen/Qwen2\.5-7B-Instruct; expected the full"):
        identify_base(BaseModelConfig(revision=None))


@pytest.mark.parametrize("model", ["a/b/c", "gs://bucket/x/", "Qwen Qwen", "-x/y", "models\\qwen", "a/"])
def test_what_is_no_base_at_all(model: str) -> None:
    with pytest.raises(ConfigError, match=r"base\.model: got '"):
        settle({"blood_type": "A", "base.model": model}, {})


def test_an_id_that_only_the_hub_library_refuses() -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: nothing can be fetched")
    config = BaseModelConfig(model="me/two--dashes")
    with pytest.raises(ConfigError, match=r"base\.model: me/two--dashes@.*not a hub id"):
        fetch_base(identify_base(config), config)


HUB = """
import sys
from lora_trainer.base_model import fetch_base, identify_base, tokenizer_folder
from lora_trainer.config import BaseModelConfig
from lora_trainer.errors import LoraTrainerError
config = BaseModelConfig()
for ask in (lambda: fetch_base(identify_base(config), config), lambda: tokenizer_folder(config)):
    try:
        ask()
    except LoraTrainerError as error:
        print(type(error).__name__, int(error.exit_code), error)
"""


def ask_a_dead_hub(home: Path, offline: str) -> subprocess.CompletedProcess[str]:
    """Ask for base and tokenizer with the cache in `home`. In a process: the hub's library reads its variables at import."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING")) and "proxy" not in name.lower()
    }
    return subprocess.run(
        [sys.executable, "-c", HUB],
        cwd=REPOSITORY,
        # nothing listens on port 9 of loopback
        env={**kept, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home), "HF_HUB_OFFLINE": offline},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_that_cannot_be_reached(tmp_path: Path, offline: str) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: nothing can be fetched")
    done = ask_a_dead_hub(tmp_path, offline)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(
            f"StorageError 6 base.model: Qwen/Qwen2.5-7B-Instruct@{COMMIT}: the hub cannot be reached and the model is not in "
        )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_cache_filled_by_an_older_client_needs_no_hub(tmp_path: Path, offline: str) -> None:
    """Such a cache has the files, but not the hub's list of them."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: nothing can be fetched")
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen2.5-7B-Instruct" / "snapshots" / COMMIT
    shutil.copytree(REPOSITORY / "examples" / "tiny-base", snapshot)
    done = ask_a_dead_hub(tmp_path, offline)
    assert done.stdout == ""
    # a download that was interrupted looks the same, and is found by its files
    (snapshot / "model.safetensors").unlink()
    done = ask_a_dead_hub(tmp_path, offline)
    assert "*.safetensors missing" in done.stdout


def test_without_the_training_stack(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['huggingface_hub'] = None\n" + HUB
    done = subprocess.run([sys.executable, "-c", hidden], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("ConfigError 2 the training stack is not installed (huggingface_hub is missing)")
