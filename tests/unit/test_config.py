"""Test settings: the precedence of their sources, and the errors for invalid values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from pydantic import ValidationError

from entrypoint.cli import cli
from lora_trainer.config import ALL_LINEAR, RunConfig, config_table, environment_name, setting_names
from lora_trainer.config_sources import parse_override, settle
from lora_trainer.errors import ConfigError, ExitCode

A = {"blood_type": "A"}


def at(config: RunConfig, dotted: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for part in dotted.split("."):
        value = value[part]
    return value


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(cli_values: dict[str, Any], environment: dict[str, str] | None = None, file: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        settle(cli_values, environment or {}, file)
    assert caught.value.exit_code == ExitCode.CONFIG
    return list(caught.value.problems)


# setting; value in Python; value as text in the file, in the environment and on the command line
SOURCES = [
    pytest.param("data", "data/", ["/file/", "/environment/", "/line/"], id="scalar"),
    pytest.param("training.epochs", 4.0, [1.5, 2.5, 3.5], id="nested"),
    pytest.param("lora.target_modules", list(ALL_LINEAR), [["q_proj"], ["k_proj", "v_proj"], ["o_proj"]], id="list"),
    pytest.param("memory.micro_batch_tokens", "auto", [1024, 2048, 4096], id="union-int"),
    pytest.param("memory.micro_batch_tokens", "auto", [1024, "auto", 2048], id="union-literal"),
    pytest.param("training.max_steps", None, [7, 8, 9], id="optional"),
    pytest.param("strict", False, [True, False, True], id="flag"),
]


@pytest.mark.parametrize(("setting", "default", "values"), SOURCES)
def test_precedence(setting: str, default: Any, values: list[Any], tmp_path: Path) -> None:
    in_file, in_environment, on_line = values
    *parents, leaf = setting.split(".")
    nested: dict[str, Any] = {leaf: in_file}
    for parent in parents:
        nested = {parent: nested}
    file = write(tmp_path, yaml.safe_dump(nested))
    as_text = ",".join(in_environment) if isinstance(in_environment, list) else str(in_environment)
    environment = {environment_name(setting): as_text}

    assert at(settle(A, {}), setting) == default
    assert at(settle(A, {}, file), setting) == in_file
    assert at(settle(A, environment, file), setting) == in_environment
    assert at(settle({**A, setting: on_line}, environment, file), setting) == on_line


def test_a_source_that_sets_one_setting_of_a_section_leaves_the_others(tmp_path: Path) -> None:
    file = write(tmp_path, "training: {epochs: 1, seed: 4}\nlora: {r: 8}\n")
    config = settle({**A, "training.seed": "6"}, {"LORA_TRAINER_TRAINING__MAX_STEPS": "5"}, file)
    assert (config.training.epochs, config.training.max_steps, config.training.seed, config.lora.r) == (1.0, 5, 6, 8)


def test_the_environment_can_name_the_file_and_the_command_line_another(tmp_path: Path) -> None:
    one, two = write(tmp_path, "lora: {r: 1}", "one.yaml"), write(tmp_path, "lora: {r: 2}", "two.yaml")
    environment = {"LORA_TRAINER_CONFIG": str(one)}
    assert settle(A, environment).lora.r == 1
    assert settle(A, environment, two).lora.r == 2


def test_an_empty_variable_is_not_set() -> None:
    assert settle(A, {"LORA_TRAINER_TRAINING__EPOCHS": "", "LORA_TRAINER_CONFIG": ""}).training.epochs == 4.0


def test_a_fallback_is_weaker_than_every_source() -> None:
    assert settle({}, {}, fallback={"blood_type": "A"}).blood_type == "A"
    assert settle({}, {"LORA_TRAINER_BLOOD_TYPE": "B"}, fallback={"blood_type": "A"}).blood_type == "B"


@pytest.mark.parametrize("text", ["none", "None", "null"])
def test_what_may_be_unset_can_be_unset_again(text: str, tmp_path: Path) -> None:
    file = write(tmp_path, "training: {max_steps: 5}")
    config = settle({**A, "training.max_steps": parse_override(f"training.max_steps={text}")[1]}, {}, file)
    assert config.training.max_steps is None


def test_all_problems_at_once_each_with_its_place(tmp_path: Path) -> None:
    file = write(tmp_path, "training:\n  epochs: 0\n  epoch: 3\nlora: {r: 9999}\ndata: 2026\n")
    environment = {
        "LORA_TRAINER_TRAINING__SEED": "many",
        "LORA_TRAINER_MEMORY__MICRO_BATCH_TOKENS": "lots",
        "LORA_TRAINER_BLOODTYPE": "A",
        "LORA_TRAINER_XYZZY": "1",
    }
    said = problems({"training.learning_rate": "2", "output": "ftp://bucket/x/"}, environment, file)
    no_integer = "input should be a valid integer, unable to parse string as an integer"
    assert sorted(said) == sorted(
        [
            "LORA_TRAINER_XYZZY: no such setting; see 'lora-trainer show-config' for all of them",
            "LORA_TRAINER_BLOODTYPE: no such setting; did you mean LORA_TRAINER_BLOOD_TYPE?",
            "blood_type: not given; pass --blood-type, or set LORA_TRAINER_BLOOD_TYPE, or 'blood_type:' in the configuration file",
            f"{file}: data: got 2026; input should be a valid string; put it in quotes",
            "command line: output: got 'ftp://bucket/x/'; unknown scheme 'ftp://'; expected s3://bucket/prefix/ or file:///folder/",
            f"{file}: lora.r: got 9999; input should be less than or equal to 512",
            f"{file}: training.epochs: got 0; input should be greater than 0",
            f"{file}: training.epoch: no such setting; did you mean training.epochs or training.keep?",
            "command line: training.learning_rate: got '2'; input should be less than or equal to 1",
            f"LORA_TRAINER_TRAINING__SEED: got 'many'; {no_integer}",
            "LORA_TRAINER_MEMORY__MICRO_BATCH_TOKENS: got 'lots'; input should be 'auto'",
            f"LORA_TRAINER_MEMORY__MICRO_BATCH_TOKENS: got 'lots'; {no_integer}",
        ]
    )


def test_the_place_is_that_of_the_value_that_won(tmp_path: Path) -> None:
    file = write(tmp_path, "lora: {r: 0}")
    assert problems(A, {"LORA_TRAINER_LORA__R": "0"}, file)[0].startswith("LORA_TRAINER_LORA__R: got '0'")
    assert problems({**A, "lora.r": "0"}, {"LORA_TRAINER_LORA__R": "8"}, file)[0].startswith("command line: lora.r: got '0'")


def test_a_file_with_braces_in_its_name_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, "lora: {r: 0}", "run{key}{0}{.yaml")
    assert problems(A, {}, file) == [f"{file}: lora.r: got 0; input should be greater than or equal to 1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[q_proj", "got '[q_proj'; input should be 'q_proj', 'k_proj', "),
        ('["q_proj", 3]', "got 3; input should be 'q_proj'"),
        ("q_proj,embed_tokens", "got 'embed_tokens'; input should be 'q_proj'"),
        ("q_proj,q_proj", "expected each module once"),
        ("[]", "at least 1 item"),
    ],
)
def test_a_list_that_is_none(text: str, said: str) -> None:
    (from_environment,) = problems(A, {"LORA_TRAINER_LORA__TARGET_MODULES": text})
    assert from_environment.startswith("LORA_TRAINER_LORA__TARGET_MODULES: got ")
    assert said in from_environment
    setting, value = parse_override(f"lora.target_modules={text}")
    (from_line,) = problems({**A, setting: value})
    assert from_line.startswith("command line: lora.target_modules: got ")
    assert said in from_line


def test_lists_have_one_order_so_that_the_same_set_is_the_same_run() -> None:
    for text in ("v_proj, q_proj", '["v_proj", "q_proj"]', ' ["q_proj","v_proj"]'):
        config = settle(A, {"LORA_TRAINER_LORA__TARGET_MODULES": text})
        assert config.lora.target_modules == ("q_proj", "v_proj")


def test_relative_paths_in_a_file_are_meant_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    write(
        tmp_path / "conf",
        "data: ../personas/\noutput: out\nwork_dir: scratch\nbase: {model: ./model, cache_dir: ../cache}\n",
    )
    monkeypatch.chdir(tmp_path)
    config = settle(A, {}, Path("conf/run.yaml"))
    assert config.data == f"{tmp_path}/personas/"
    assert config.output == f"{tmp_path}/conf/out"
    assert config.work_dir == tmp_path / "conf" / "scratch"
    assert config.base.model == f"{tmp_path}/conf/model"
    assert config.base.cache_dir == tmp_path / "cache"
    # the same path on the command line is relative to the working folder
    assert settle({**A, "data": "../personas/"}, {}, Path("conf/run.yaml")).data == "../personas/"


def test_what_is_no_relative_path_stays_as_it_is(tmp_path: Path) -> None:
    text = "data: s3://bucket/data/\noutput: /srv/out/\nbase: {model: Qwen/Qwen2.5-0.5B-Instruct}\n"
    config = settle(A, {}, write(tmp_path, text))
    assert (config.data, config.output, config.base.model) == ("s3://bucket/data/", "/srv/out/", "Qwen/Qwen2.5-0.5B-Instruct")


def test_an_empty_path_in_a_file_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "data: ''")
    assert problems(A, {}, file) == [f"{file}: data: got ''; expected s3://bucket/prefix/, file:///folder/ or a folder"]


def test_home_in_work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert settle(A, {}, write(tmp_path, "work_dir: ~/scratch")).work_dir == Path("/home/someone/scratch")
    (said,) = problems({**A, "work_dir": "~nobody-of-this-name/x"})
    assert said.startswith("command line: work_dir: got ")
    assert "no home" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: !!python/object/apply:os.getcwd []", r"run.yaml:1: not plain YAML: could not determine a constructor"),
        ("a: 1\nb: !custom x", r"run.yaml:2: not plain YAML"),
        ("training: {epochs: 3", r"run.yaml:1: not plain YAML"),
        ("- a\n- b", r"run.yaml: got a list, expected a mapping of settings"),
        ("just words", r"run.yaml: got text, expected a mapping"),
        ("1: 2", r"run.yaml: got the key 1, expected the name of a setting"),
    ],
)
def test_files_that_are_no_settings(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        settle(A, {}, write(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("data: caf\xe9".encode("latin-1"))
    assert problems(A, {}, tmp_path / "latin.yaml") == [
        f"{tmp_path}/latin.yaml:1: not UTF-8; expected a UTF-8 file: save it again in that encoding"
    ]
    for path, reason in ((tmp_path / "nowhere.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        assert problems(A, {}, path) == [f"{path}: cannot read the configuration file: {reason}; check the path given to --config"]


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert settle(A, {}, write(tmp_path, "# nothing yet\n")) == settle(A, {})


def test_a_section_that_is_none(tmp_path: Path) -> None:
    file = write(tmp_path, "training: 3")
    (said,) = problems(A, {}, file)
    assert said.startswith(f"{file}: training: got 3; ")


BOUNDS = [
    ("lora.r", 1, 512, [0, 513, 1.5]),
    ("lora.alpha", 0.001, 1024, [0, -1, 1025, "inf", "nan"]),
    ("lora.dropout", 0, 0.99, [-0.1, 1]),
    ("training.epochs", 0.01, 1000, [0, 1001]),
    ("training.max_steps", 1, 10**9, [0, -1]),
    ("training.sequences_per_step", 1, 65536, [0, 65537]),
    ("training.learning_rate", 1e-9, 1, [0, 1.1, "nan"]),
    ("training.warmup_fraction", 0, 0.99, [-0.1, 1]),
    ("training.weight_decay", 0, 1, [-0.1, 1.1]),
    ("training.max_grad_norm", 0.001, 1e6, [0, "inf"]),
    ("training.max_length_tokens", 16, 32768, [15, 32769]),
    ("training.held_out_fraction", 0.001, 0.89, [0, 0.9]),
    ("training.held_out_measurements_per_epoch", 1, 1000, [0, 1001]),
    ("training.early_stopping", 1, 10**6, [0]),
    ("training.seed", 0, 2**32 - 1, [-1, 2**32]),
    ("memory.micro_batch_tokens", 64, 1_048_576, [63, 1_048_577]),
    ("logging.log_every_steps", 1, 10**6, [0]),
]


@pytest.mark.parametrize(("setting", "least", "most", "refused"), BOUNDS, ids=[row[0] for row in BOUNDS])
def test_ranges(setting: str, least: float, most: float, refused: list[Any]) -> None:
    for value in (least, most):
        assert at(settle({**A, setting: str(value)}, {}), setting) == value
    for value in refused:
        assert problems({**A, setting: str(value)})[0].startswith(f"command line: {setting}: got '{value}'")


@pytest.mark.parametrize(
    ("setting", "refused"),
    [
        ("blood_type", "C"),
        ("backend", "jax"),
        ("device", "mps"),
        ("training.schedule", "step"),
        ("training.keep", "first"),
        ("training.quantization", "int8"),
        ("training.compute_dtype", "float16"),
        ("memory.gradient_checkpointing", "maybe"),
        ("logging.level", "loud"),
        ("logging.format", "xml"),
        ("strict", "perhaps"),
        ("base.model", ""),
        ("base.revision", "main"),
        ("base.revision", "A09A35458C702B33EEACC393D103063234E8BC28"),
        ("data", "s3://"),
        ("data", "/"),
        ("output", "https://host/x/"),
    ],
)
def test_values_that_are_none_of_the_choices(setting: str, refused: str) -> None:
    assert problems({**A, setting: refused})[0].startswith(f"command line: {setting}: got {refused!r}; ")


@pytest.mark.parametrize(("given", "settled"), [("a", "A"), ("ab", "AB"), ("Ab", "AB"), ("o", "O"), ("B", "B")])
def test_blood_types_in_any_case(given: str, settled: str) -> None:
    assert settle({"blood_type": given}, {}).blood_type == settled


@pytest.mark.parametrize(
    ("backend", "device", "resolved"),
    [
        ("auto", "cuda", "unsloth"),
        ("auto", "cpu", "transformers"),
        ("transformers", "cuda", "transformers"),
        ("unsloth", "cpu", "unsloth"),
    ],
)
def test_the_backend_follows_the_device(backend: str, device: str, resolved: str) -> None:
    assert settle({**A, "backend": backend, "device": device}, {}).resolved_backend == resolved


def test_frozen() -> None:
    config = settle(A, {})
    for part, name in ((config, "data"), (config.training, "seed"), (config.lora, "r")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, 1)


def test_overrides() -> None:
    assert parse_override("lora.r=32") == ("lora.r", "32")
    assert parse_override("data=s3://b/x=1/") == ("data", "s3://b/x=1/")
    assert parse_override("base.canonical_id=none") == ("base.canonical_id", None)
    # for a setting that cannot be unset, `none` is ordinary text
    assert parse_override("data=none") == ("data", "none")
    for text, hint in (
        ("lora.rr=3", "did you mean lora.r or "),
        ("lora.r", "did you mean lora.r"),
        ("=3", "see 'lora-trainer show-config'"),
        ("lora=3", "expected SETTING=VALUE"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_override(text)
        assert str(caught.value).startswith(f"--set {text.replace('3', '…')}: expected SETTING=VALUE; ")
        assert hint in str(caught.value)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Remove the developer's settings. Return an empty working folder."""
    for variable in [*map(environment_name, setting_names()), "LORA_TRAINER_CONFIG"]:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["show-config", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


CHANGES = [
    [],
    ["--blood-type", "ab", "--strict", "--set", "lora.target_modules=v_proj,q_proj", "--set", "memory.micro_batch_tokens=4096"],
    ["--set", "training.max_steps=7", "--set", "base.revision=none", "--learning-rate", "1e-05", "--set", "lora.alpha=1e3"],
    ["--data", "한글 폴더/: {x}, #y", "--output", "s3://bucket/a b/", "--base-model", "./base: 'x'"],
]


@pytest.mark.parametrize("arguments", CHANGES)
def test_show_config_is_taken_back(bare: Path, arguments: list[str]) -> None:
    before = json.loads(shown(*arguments, "--json"))
    write(bare, shown(*arguments), "shown.yaml")
    after = json.loads(shown("--config", "shown.yaml", "--json"))
    # Relative paths start from the settings file's folder, which here is the working folder.
    for name in ("data", "output", "work_dir"):
        if "://" not in before[name]:
            trailing = "/" if before[name].endswith("/") else ""
            before[name] = f"{bare}/{before[name].rstrip('/')}{trailing}"
    if before["base"]["model"].startswith("./"):
        before["base"]["model"] = f"{bare}/{before['base']['model'][2:]}"
    assert after == before
    write(bare, shown("--config", "shown.yaml"), "again.yaml")
    assert json.loads(shown("--config", "again.yaml", "--json")) == after


@pytest.mark.usefixtures("bare")
def test_show_config_explains_every_setting() -> None:
    text = shown()
    for name, _, allowed, meaning in config_table():
        comment = f"# {meaning}" + (f" [{allowed}]" if allowed else "")
        assert comment in [line.strip() for line in text.splitlines()], name


def test_the_table_has_every_setting_with_default_and_range() -> None:
    rows = {name: (default, allowed) for name, default, allowed, _ in config_table()}
    assert list(rows) == list(setting_names())
    assert all(meaning for *_, meaning in config_table())
    assert rows["blood_type"] == ("required", "A, B, O, AB")
    assert rows["lora.r"] == ("16", "≥ 1, ≤ 512")
    assert rows["lora.target_modules"][0] == "all seven"
    assert rows["training.learning_rate"] == ("0.0005", "> 0, ≤ 1")
    assert rows["training.max_steps"] == ("none", "≥ 1")
    assert rows["training.seed"] == ("20", "≥ 0, < 4,294,967,296")
    assert rows["memory.micro_batch_tokens"] == ("auto", "auto or ≥ 64, ≤ 1,048,576")
    assert rows["strict"] == ("false", "")
