"""What people write into the configuration file, the environment and `--set`: it works, or the message says what to change."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import pytest

from entrypoint.cli import run_cli
from lora_trainer.config import RunConfig
from lora_trainer.config_sources import parse_override, settle
from lora_trainer.errors import ConfigError, ExitCode
from lora_trainer.lists import listed
from lora_trainer.persona.vocabulary import parse_blood_types

A = {"blood_type": "A"}


def settled(folder: Path, content: str | bytes) -> RunConfig:
    path = folder / "run.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return settle(A, {}, path)


def refusal(folder: Path, content: str | bytes) -> str:
    with pytest.raises(ConfigError) as refused:
        settled(folder, content)
    return str(refused.value)


@pytest.mark.parametrize("section", ["training:\n#  epochs: 3\n", "training: null\n", "training: ~\nlora:\n", "training: {}\n"])
def test_an_empty_section_sets_nothing(section: str, tmp_path: Path) -> None:
    assert settled(tmp_path, section) == settle(A, {})


def test_a_dotted_key_is_its_setting(tmp_path: Path) -> None:
    assert settled(tmp_path, "training.epochs: 5\ntraining: {seed: 7}\nlora.r: 8\n").training.epochs == 5
    # relative paths too
    assert settled(tmp_path, "base.cache_dir: cache\n").base.cache_dir == tmp_path / "cache"
    said = refusal(tmp_path, "training.epochs: 5\ntraining:\n  epochs: 3\n")
    assert said.endswith("training.epochs: got it twice, as 'training.epochs' and as 'training: epochs'; expected one of them")
    assert "got it twice" in refusal(tmp_path, "training: 3\ntraining.epochs: 2\n")


@pytest.mark.parametrize(
    ("content", "setting", "value"),
    [
        ("training: {learning_rate: 1e-4}", "training.learning_rate", 0.0001),
        ("training: {learning_rate: 5E-05}", "training.learning_rate", 0.00005),
        ("training: {seed: 010}", "training.seed", 10),
        ("training: {seed: 1e+06}", "training.seed", 1_000_000),
        ("training: {seed: '1e+06'}", "training.seed", 1_000_000),
        ("training: {seed: 1_000}", "training.seed", 1000),
        ("strict: yes", "strict", True),
        ("strict: off", "strict", False),
        ("output: on", "output", None),
        ("lora: {target_modules: q_proj}", "lora.target_modules", ("q_proj",)),
        ("lora: {target_modules: '[q_proj, v_proj]'}", "lora.target_modules", ("q_proj", "v_proj")),
        ("evaluation: {intensities: 0.5}", "evaluation.intensities", (0.5,)),
        ("logging: {report_to: none}", "logging.report_to", ()),
        ("logging: {report_to: mlflow}", "logging.report_to", ("mlflow",)),
        ('{"training": {"epochs": 2}, "strict": true}', "training.epochs", 2),
        ("---\ntraining: {epochs: 2}\n", "training.epochs", 2),
        (codecs.BOM_UTF8 + b"training: {epochs: 2}\n", "training.epochs", 2),
        (b"training: {epochs: 2}\r\nstrict: true\r\n", "training.epochs", 2),
    ],
)
def test_what_works(content: str | bytes, setting: str, value: Any, tmp_path: Path) -> None:
    found: Any = settled(tmp_path, content)
    for part in setting.split("."):
        found = getattr(found, part)
    assert found == (str(tmp_path / "on") if value is None else value)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("training: {epochs: true}", ["training.epochs: got True", "a number"]),
        ("training: {epochs: yes}", ["training.epochs: got 'yes'", "valid number"]),
        ("training: {epochs: 1:30}", ["training.epochs: got '1:30'", "valid number"]),
        ("training: {epochs: .nan}", ["training.epochs: got nan", "finite"]),
        ("evaluation: {intensities: [0.5, .nan]}", ["evaluation.intensities: got nan", "finite"]),
        ("gates: {persona: .inf}", ["gates.persona: got inf"]),
        ("training: {epochs: }", ["training.epochs: got nothing"]),
        ("output:\n", ["output: got nothing"]),
        ("training:\n  epochs:3\n", ["training: got 'epochs:3'", "a space after its colon", "'epochs: ...'"]),
        ("training:\n- epochs: 3\n", ["training: got [{'epochs': 3}]", "each on a line of its own"]),
        ("logging: {level: off}", ["logging.level: got 'off'"]),
        ("evaluation: {intensities: [10, 80]}", ["80 looks like a percentage: write 0.8"]),
        ("gates: {persona: 90}", ["gates.persona: got 90", "looks like a percentage: write 0.9"]),
        ("training: {held_out_fraction: 5}", ["looks like a percentage: write 0.05"]),
        ("base: {canonical_id: 7}", ["base.canonical_id: got 7", "put it in quotes"]),
        ("training:\n\tepochs: 3\n", [":2: not plain YAML: a tab; YAML is indented with spaces"]),
        ("strict: true\n---\nstrict: false\n", [":2: not plain YAML: a second document after '---'"]),
        ("training: {epochs: 1, epochs: 2}", ["a duplicate key, 'epochs'"]),
        ("strict: true\n\nstrict: false", [":3: not plain YAML: a duplicate key, 'strict'"]),
        ("- training\n", ["got a list, expected a mapping of settings"]),
        ("3", ["got a number, expected a mapping"]),
        ("training\uff1a\n  epochs: 3\n", ["the character \uff1a is not the one"]),
        ("epochs: 3", ["epochs: no such setting", "did you mean training.epochs?"]),
        ("training:\n\u00a0\u00a0epochs: 3", ["did you mean training.epochs?", "U+00A0 NO-BREAK SPACE"]),
        ("training__epochs: 3", ["did you mean training.epochs"]),
        ("1: x", ["got the key 1, expected the name of a setting"]),
        ("training: {2: x}", ["got the key 2, expected the name of a setting"]),
        ("data: 한글".encode("utf-16"), ["not UTF-8; it looks like UTF-16"]),
        ("data: a\n".encode("utf-16-le"), ["not UTF-8; it looks like UTF-16"]),
        ("strict: true\ndata: 한글/자료\n".encode("cp949"), [":2: not UTF-8; it looks like CP949"]),
        ("output: s3:/team/lora/", ["output: got 's3:/team/lora/'", "did you mean s3://team/lora/?"]),
        ("work_dir: s3://team/x/", ["work_dir: got 's3://team/x/'", "a path on this machine"]),
    ],
)  # fmt: skip
def test_what_is_explained(content: str | bytes, parts: list[str], tmp_path: Path) -> None:
    said = refusal(tmp_path, content)
    assert [part for part in parts if part not in said] == [], said
    assert len(said.splitlines()) == 1 + ("[10, 80]" in str(content))


@pytest.mark.parametrize(
    "text", ["q_proj,v_proj", "[q_proj,v_proj]", "[ q_proj , v_proj ]", '["q_proj","v_proj"]', "(q_proj,v_proj)",
             "{q_proj,v_proj}", "['q_proj', 'v_proj']", '"q_proj","v_proj"', '"[q_proj,v_proj]"', "[q_proj,v_proj,]"],
)  # fmt: skip
def test_a_list_in_any_brackets(text: str) -> None:
    assert listed(text) == ["q_proj", "v_proj"]
    setting, value = parse_override(f"lora.target_modules={text}")
    for config in (settle({**A, setting: value}, {}), settle(A, {"LORA_TRAINER_LORA__TARGET_MODULES": text})):
        assert config.lora.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [
        ("evaluation.intensities", "[0.5]", (0.5,)),
        ("evaluation.intensities", "(0.1, 0.9)", (0.1, 0.9)),
        ("logging.report_to", "[mlflow]", ("mlflow",)),
        ("logging.report_to", "[]", ()),
        ("logging.report_to", "none", ()),
    ],
)
def test_every_list_setting_reads_brackets(setting: str, text: str, value: Any) -> None:
    section, name = setting.split(".")
    from_line = settle({**A, **dict([parse_override(f"{setting}={text}")])}, {})
    from_environment = settle(A, {f"LORA_TRAINER_{section.upper()}__{name.upper()}": text})
    # as an option of its own, such as --report-to
    from_option = settle({**A, setting: text}, {})
    assert [getattr(getattr(config, section), name) for config in (from_line, from_environment, from_option)] == [value] * 3


def test_an_intensity_that_is_a_percentage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["chat", "--adapter", "x", "--intensity", "80"]) == ExitCode.CONFIG
    assert "80 looks like a percentage: write 0.8" in capsys.readouterr().err


def test_quotes_that_docker_keeps() -> None:
    with pytest.raises(ConfigError, match=r"LORA_TRAINER_TRAINING__EPOCHS: got '\"3\"'; the quotes are part of the value"):
        settle(A, {"LORA_TRAINER_TRAINING__EPOCHS": '"3"'})
    with pytest.raises(ConfigError, match=r"LORA_TRAINER_OUTPUT: .*quotes"):
        settle(A, {"LORA_TRAINER_OUTPUT": "'s3://team/x/'"})


@pytest.mark.parametrize("text", ["[A,B]", "(a, b)", '["A", "B"]', "A,B"])
def test_several_blood_types(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert [str(each) for each in parse_blood_types(text)] == ["A", "B"]
    assert run_cli(["show-config", "--blood-type", text, "--json"]) == ExitCode.DONE
    assert '"B"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("О", ["U+041E CYRILLIC CAPITAL LETTER O", "did you mean O?"]),
        ("А", ["U+0410 CYRILLIC CAPITAL LETTER A", "did you mean A?"]),
        ("Β", ["U+0392 GREEK CAPITAL LETTER BETA", "did you mean B?"]),
        ("\uff21", ["U+FF21 FULLWIDTH LATIN CAPITAL LETTER A", "did you mean A?"]),
        ("АВ", ["U+0410", "U+0412", "did you mean AB?"]),
        ("0", ["'0'", "did you mean O?"]),
        ("A\u200b", ["U+200B ZERO WIDTH SPACE", "did you mean A?"]),
        ("A형", ["did you mean A?"]),
        ("에이비", ["did you mean AB?"]),
        ("오형", ["did you mean O?"]),
        ("Type B", ["did you mean B?"]),
        ("C", ["'C'; expected A, B, O or AB"]),
    ],
)
def test_letters_that_look_like_a_blood_type(text: str, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        settle({"blood_type": text}, {})
    assert [part for part in parts if part not in str(refused.value)] == [], str(refused.value)
