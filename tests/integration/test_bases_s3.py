"""Test a base from `s3://`: the job mirrors it once, keeps it up to date, and treats it like the same files in a folder."""

from __future__ import annotations

from pathlib import Path

import boto3
import pytest
from broken_bases import WEIGHTS, copy_base, keep_tensors

from lora_trainer.base_model import fetch_base, identify_base, tokenizer_folder
from lora_trainer.config import BaseModelConfig
from lora_trainer.errors import ConfigError
from lora_trainer.run.shared_models import SharedModels
from lora_trainer.store.interface import NotFound
from lora_trainer.store.opening import open_storage
from lora_trainer.store.retry import RetryBudget

pytestmark = pytest.mark.integration

FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights", "generation_config.json": b"{}"}


@pytest.fixture
def config(bucket: str, tmp_path: Path) -> BaseModelConfig:
    """Upload a base and the other files that such prefixes often contain. Return a configuration that names it."""
    client = boto3.client("s3")
    for name, data in {**FILES, "README.md": b"#", "model.bin": b"code", "original/config.json": b"other"}.items():
        client.put_object(Bucket=bucket, Key=f"bases/tiny/{name}", Body=data)
    # an object under another prefix that starts with the same characters
    client.put_object(Bucket=bucket, Key="bases/tiny-2/config.json", Body=b"{}")
    return BaseModelConfig(model=f"s3://{bucket}/bases/tiny", cache_dir=tmp_path / "cache")


def mirrored(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_ino) for path in folder.iterdir() if not path.name.startswith(".")}


def mirror(config: BaseModelConfig) -> Path:
    folder = identify_base(config).folder
    assert folder is not None
    return folder


def test_only_the_model_is_mirrored(config: BaseModelConfig) -> None:
    base = identify_base(config)
    assert base.folder is not None
    assert base.folder.is_relative_to(config.cache_dir)
    assert {name: data for name, (data, _) in mirrored(base.folder).items()} == FILES
    assert (base.canonical_id, base.revision) == ("tiny", None)
    assert fetch_base(base, config) == base.folder


def test_it_is_the_same_base_as_the_files_in_a_folder(config: BaseModelConfig, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    for name, data in FILES.items():
        (local / name).write_bytes(data)
    assert identify_base(config).identity == identify_base(BaseModelConfig(model=str(local))).identity


def test_a_second_run_fetches_nothing(config: BaseModelConfig) -> None:
    before = mirrored(mirror(config))
    # The files are the same ones: a download would create new files.
    assert mirrored(mirror(config)) == before
    # The trailing slash makes no difference.
    assert mirrored(mirror(config.model_copy(update={"model": config.model + "/"}))) == before


def test_a_changed_object_is_fetched_again_though_its_size_is_the_same(config: BaseModelConfig, bucket: str) -> None:
    folder = mirror(config)
    identity, before = identify_base(config).identity, mirrored(folder)
    boto3.client("s3").put_object(Bucket=bucket, Key="bases/tiny/model.safetensors", Body=b"WEIGHTS")
    assert identify_base(config).identity != identity
    after = mirrored(folder)
    assert after["model.safetensors"][0] == b"WEIGHTS"
    assert {name for name in FILES if after[name] != before[name]} == {"model.safetensors"}


def test_a_removed_object_goes_and_a_new_one_comes(config: BaseModelConfig, bucket: str) -> None:
    folder = mirror(config)
    client = boto3.client("s3")
    client.delete_object(Bucket=bucket, Key="bases/tiny/generation_config.json")
    client.put_object(Bucket=bucket, Key="bases/tiny/added_tokens.json", Body=b"{}")
    assert mirror(config) == folder
    assert set(mirrored(folder)) == {*FILES, "added_tokens.json"} - {"generation_config.json"}
    client.put_object(Bucket=bucket, Key="bases/tiny/generation_config.json", Body=b"{}")
    assert "generation_config.json" in mirrored(mirror(config))


def test_a_mirror_that_lost_or_cut_a_file_is_mended(config: BaseModelConfig) -> None:
    folder = mirror(config)
    identity = identify_base(config).identity
    (folder / "config.json").unlink()
    (folder / "model.safetensors").write_bytes(b"wei")
    (folder / "stray.json").write_bytes(b"{}")
    assert identify_base(config).identity == identity
    assert {name: data for name, (data, _) in mirrored(folder).items()} == FILES


@pytest.mark.parametrize("record", [b'{"config.json": {"si', b"[]", b"", b"\xff"])
def test_a_damaged_record_costs_a_download_and_no_traceback(config: BaseModelConfig, record: bytes) -> None:
    folder = mirror(config)
    before = mirrored(folder)
    (folder / ".mirror.json").write_bytes(record)
    assert mirror(config) == folder
    after = mirrored(folder)
    assert {name: data for name, (data, _) in after.items()} == FILES
    assert all(after[name] != before[name] for name in FILES)
    assert mirrored(mirror(config)) == after


def test_two_bases_do_not_share_a_mirror(config: BaseModelConfig, bucket: str) -> None:
    client = boto3.client("s3")
    for name, data in FILES.items():
        client.put_object(Bucket=bucket, Key=f"other/{name}", Body=data)
    other = config.model_copy(update={"model": f"s3://{bucket}/other/"})
    assert mirror(other) != mirror(config)
    assert identify_base(other).identity == identify_base(config).identity


def test_a_prefix_without_a_model(config: BaseModelConfig, bucket: str) -> None:
    for prefix, missing in (
        ("nothing/", r"config\.json, tokenizer\.json, \*\.safetensors missing"),
        ("bases/tiny-2", r"tokenizer\.json, \*\.safetensors missing"),
    ):
        with pytest.raises(ConfigError, match=rf"base\.model: s3://{bucket}/{prefix}.*not a model: {missing}"):
            identify_base(config.model_copy(update={"model": f"s3://{bucket}/{prefix}"}))


def test_the_tokenizer_comes_without_the_weights(config: BaseModelConfig, bucket: str) -> None:
    folder = tokenizer_folder(config)
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]
    with pytest.raises(NotFound, match=r"nothing/tokenizer\.json: not found"):
        tokenizer_folder(config.model_copy(update={"model": f"s3://{bucket}/nothing/"}))


def test_a_cache_that_is_in_the_way(config: BaseModelConfig, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match="got a file"):
        identify_base(config)
    assert open_storage(config.model).exists("config.json")


def test_a_broken_base_is_refused_before_its_weights_are_copied(bucket: str, tmp_path: Path) -> None:
    base = copy_base(tmp_path / "base")
    keep_tensors(base, lambda name: "layers.1." not in name)
    for path in base.iterdir():
        boto3.client("s3").upload_file(str(path), bucket, f"broken/{path.name}")
    config = BaseModelConfig(model=f"s3://{bucket}/broken/", cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"broken: the weights have no model\.layers\.1\."):
        SharedModels().base(config, RetryBudget())
    assert not (tmp_path / "cache").exists()


def test_a_copy_that_the_disk_damaged_is_refused(bucket: str, tmp_path: Path) -> None:
    for path in copy_base(tmp_path / "base").iterdir():
        boto3.client("s3").upload_file(str(path), bucket, f"tiny/{path.name}")
    config = BaseModelConfig(model=f"s3://{bucket}/tiny/", cache_dir=tmp_path / "cache")
    base = SharedModels().base(config, RetryBudget())
    assert base.identity == identify_base(BaseModelConfig(model=str(tmp_path / "base"))).identity
    assert base.folder is not None
    weights = base.folder / WEIGHTS
    # the size stays, so the mirror does not fetch it again
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    with pytest.raises(ConfigError, match=r"cache/bases/.*model\.safetensors: got a header of"):
        SharedModels().base(config, RetryBudget())
