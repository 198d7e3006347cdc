"""Test hostile configuration files, names and manifests: each yields one message and exit 2, and changes no other file."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hostile import configs, count, drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrypoint.cli import run_cli
from lora_trainer.base_model import require_safetensors
from lora_trainer.config import RunConfig
from lora_trainer.config_sources import settle
from lora_trainer.data.compression import is_jsonl
from lora_trainer.errors import ConfigError, ExitCode
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.run.adapter import open_adapter
from lora_trainer.run.inputs import data_key
from lora_trainer.store.keys import split_uri
from lora_trainer.store.opening import open_storage


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("LORA_TRAINER_"):
            monkeypatch.delenv(variable)


def show_config(content: bytes) -> tuple[int, str]:
    """Run `show-config` on a file with this content. Return its exit code and all output."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_bytes(content)
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = run_cli(["show-config", "--blood-type", "A", "--config", str(path)])
    return code, out.getvalue()


@settings(max_examples=drawn(600, 25), deadline=None, suppress_health_check=list(HealthCheck))
@given(configs)
def test_a_hostile_configuration_is_settings_or_one_message_each_and_exit_2(content: bytes) -> None:
    count("configs")
    code, said = show_config(content)
    assert code in (ExitCode.DONE, ExitCode.CONFIG), said
    assert "Traceback" not in said
    if code == ExitCode.CONFIG:
        problems = said.splitlines()
        assert all(len(problem) < 1500 for problem in problems)
        assert len(problems) < 50


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("training: !!python/object/apply:os.system ['true']", "run.yaml:1: not plain YAML: could not determine a constructor"),
        ("data: x\ndata: y", "run.yaml:2: not plain YAML: a duplicate key, 'data'"),
        ("strict: !!bool maybe", "run.yaml:1: not plain YAML: a value that does not match its type"),
        ("strict: true\nlora: {r: " + "9" * 5000 + "}", "run.yaml:2: not plain YAML: a value that does not match its type"),
        ("data: !!timestamp 2026-13-01", "run.yaml:1: not plain YAML: a value that does not match its type"),
        ("a: &a [*a]", "run.yaml:1: not plain YAML: more than 10,000 values with its aliases expanded"),
        ("[" * 20_000, "run.yaml: not plain YAML: nested too deeply"),
        ("".join(f"k{n}: 0\n" for n in range(4000)), "and 3,950 more problems: is this a file of settings?"),
        ("data: \x00", "run.yaml: not plain YAML: a character that YAML does not allow"),
        ("#" * 2**21, "run.yaml: got more than 1,048,576 bytes"),
        ('work_dir: "a\\0b"', "work_dir: got "),
        ('data: "\\ud800"', "data: got "),
    ],
)
def test_what_is_said(content: str, said: str) -> None:
    code, output = show_config(content.encode())
    assert code == ExitCode.CONFIG
    assert said in output


@pytest.mark.parametrize("merge", [False, True])
def test_aliases_that_multiply_are_refused_before_they_do(merge: bool) -> None:
    how = "{{<<: [{0}]}}" if merge else "[{0}]"
    levels = "".join(f"a{n}: &a{n} {how.format(','.join([f'*a{n - 1}'] * 10))}\n" for n in range(1, 30))
    code, output = show_config(f"a0: &a0 {{x: 1}}\n{levels}".encode())
    assert code == ExitCode.CONFIG
    assert "with its aliases expanded" in output
    assert len(output) < 1000


def test_an_alias_that_multiplies_nothing_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("blood_type: &type A\nbase: {canonical_id: *type}")
    assert settle({}, {}, tmp_path / "run.yaml").base.canonical_id == "A"


@pytest.mark.parametrize("path", ["/proc/self/mem", "/dev/zero", "/", "a\0b"])
def test_what_is_no_configuration_file(path: str) -> None:
    with pytest.raises(ConfigError):
        settle({"blood_type": "A"}, {}, Path(path))


@settings(max_examples=drawn(2_000, 100), deadline=None)
@given(
    st.sampled_from(["s3://bucket/", "file:///srv/", "", "/srv/", "s3://bucket/a/b/"]),
    st.lists(
        st.sampled_from(
            ["..", ".", "/", "\\", "\0", "%2e%2e", "%2f", "%5c", "%00", "\n", "\x7f", "\ud800", "a", "~", " ", "\u202e"]
        )
    ).map("".join),
)
def test_no_uri_leads_out_of_its_folder(folder: str, name: str) -> None:
    count("names")
    uri = f"{folder}{name}.jsonl"
    try:
        config = RunConfig(blood_type=BloodType.A, data=uri)
        storage_uri, key = split_uri(config.data)
        open_storage(storage_uri)
    except (ConfigError, ValueError):
        return
    assert is_jsonl(key)
    target = Path(os.path.normpath(Path("/srv/data") / key))
    assert target.is_relative_to("/srv/data")
    assert target != Path("/srv/data")
    assert "\\" not in key
    assert key.isprintable() or "\u202e" in key


# --- the persona's file in a folder ----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_the_persona_file_is_found_compressed_or_not(tmp_path: Path, suffix: str) -> None:
    name = f"train_data_type_A.jsonl{suffix}"
    (tmp_path / name).touch()
    (tmp_path / "train_data_type_AB.jsonl").touch()
    assert data_key(open_storage(str(tmp_path)), BloodType.A) == name


def test_two_files_of_one_persona_are_refused(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        (tmp_path / f"train_data_type_A.jsonl{suffix}").touch()
    with pytest.raises(ConfigError, match=r"got train_data_type_A\.jsonl\.gz and train_data_type_A\.jsonl\.zst, expected one"):
        data_key(open_storage(str(tmp_path)), BloodType.A)


# --- adapters --------------------------------------------------------------------------------------------


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def bundle_with(folder: Path, files: dict[str, Any], **facts: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {
        "schema": 1,
        "run_id": "0123456789abcdef",
        "blood_type": "A",
        "started_at": "2026-01-01T00:00:00+00:00",
    }
    manifest |= {"data": {"uri": "data/", "sha256": "0" * 64}, "base": {"identity": "sha256:0"}}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **facts, "files": files}))
    return str(folder)


FACTS = {"size_bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize("command", [["evaluate", "--adapter"], ["chat", "--adapter"]])
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "weights/Adapter.PTH", "adapter_model.pkl"])
def test_pickled_weights_are_refused_and_never_unpickled(
    tmp_path: Path, command: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sprung = tmp_path / "sprung"
    folder = tmp_path / "bundle"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    uri = bundle_with(folder, {name: FACTS, "adapter_config.json": FACTS})
    assert run_cli([*command, uri]) == ExitCode.CONFIG
    said = capsys.readouterr()
    assert f"{name}: got weights that are pickled" in said.out + said.err
    assert not sprung.exists()


def test_a_folder_whose_weights_are_pickled_is_not_given_to_peft(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors"):
        require_safetensors(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    require_safetensors(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ConfigError, match="got weights that are pickled"):
        require_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("facts", "files", "said"),
    [
        ({"run_id": "../../precious"}, {}, "run_id: got '../../precious'"),
        ({"run_id": "/precious"}, {}, "run_id: got '/precious'"),
        ({"run_id": ""}, {}, "run_id: got ''"),
        ({"run_id": 5}, {}, "run_id: got 5; expected a string"),
        ({"blood_type": "../A"}, {}, "blood_type: got '../A'"),
        ({"blood_type": ["A"]}, {}, "blood_type: got a list"),
        ({}, {"../../x": FACTS}, "unsafe key '../../x'"),
        ({}, {"/x": FACTS}, "unsafe key '/x'"),
        ({}, {"a\\b": FACTS}, "unsafe key"),
        ({}, {"x": 5}, "files.x: got 5; expected an object"),
        ({"data": "x"}, {}, "data: got 'x'; expected an object"),
        ({"base": {"identity": 5}}, {}, "base.identity: got 5; expected a string"),
        ({"config": []}, {}, "config: got a list"),
    ],
)
def test_a_manifest_names_nothing_outside(tmp_path: Path, facts: dict[str, Any], files: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_adapter(bundle_with(tmp_path / "bundle", files, **facts))
    assert said in str(refused.value)


def test_a_manifest_that_is_nested_without_end_is_none(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema": ' + "[" * 100_000)
    with pytest.raises(ConfigError, match="not a manifest of schema 1"):
        open_adapter(str(tmp_path))
