"""Check that the chart's generated files match the project. tests/chart tests the chart itself, through Helm."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from conftest import REPOSITORY, load_tool

from lora_trainer.config import RunConfig, setting_names

tool: Any = load_tool("chart_files")
CHART: Final = REPOSITORY / "charts" / "persona-train"
SCHEMA: Final[dict[str, Any]] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("path", "text"), list(tool.wanted()), ids=lambda value: value.name if isinstance(value, Path) else "")
def test_what_is_generated_is_what_is_there(path: Path, text: str) -> None:
    assert path.read_text(encoding="utf-8") == text, "python tools/chart_files.py --write"


def test_the_chart_is_of_this_version() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == project["version"]
    assert tool.app_version("appVersion: 0.0.9\n") == f"appVersion: {project['version']}\n"


def test_the_base_is_the_jobs_default() -> None:
    base = RunConfig.model_fields["base"].default
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["baseModel"]
    assert (values["id"], values["revision"]) == (base.model, base.revision)
    assert (
        tool.base_model("baseModel:\n  id: a/b\n  revision: c\n")
        == f"baseModel:\n  id: {base.model}\n  revision: {base.revision}\n"
    )


def objects(schema: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every object schema that lists its properties, with its path."""
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            yield where, schema
        for key, part in schema.items():
            yield from objects(part, f"{where}/{key}")
    elif isinstance(schema, list):
        for part in schema:
            yield from objects(part, where)


FREE: Final = ("/anyOf", "/properties/extraEnv/items", "/properties/extraVolumes/items", "/properties/extraVolumeMounts/items",
               "/properties/initContainers/items")  # fmt: skip


def test_the_schema_is_closed() -> None:
    """Only Kubernetes objects stay open, because they have more fields than a chart should know."""
    found = list(objects(SCHEMA))
    assert len(found) > 30
    assert {where for where, schema in found if schema.get("additionalProperties") is not False} == set(FREE)


def test_every_value_has_a_type_of_its_own() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    # a parent chart passes `global` to all of its charts, and uses one if its `enabled` is true
    assert set(SCHEMA["properties"]) == set(values) | {"global", "enabled"}


def test_the_settings_file_is_run_config() -> None:
    def names(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, part in schema["properties"].items():
            if "properties" in part:
                yield from names(part, f"{prefix}{name}.")
            else:
                yield prefix + name
                assert part["description"], name

    assert list(names(SCHEMA["properties"]["config"])) == list(setting_names())
    # a settings file may omit any setting
    assert all("required" not in schema for _, schema in objects(tool.config_schema()))


# Helm passes some numbers as text
NUMBER = {"type": ["number", "string"], "pattern": r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$"}
INTEGER = {"type": ["integer", "string"], "pattern": r"^[-+]?[0-9]+(\.0+)?([eE]\+?[0-9]+)?$"}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("training.epochs", {**NUMBER, "exclusiveMinimum": 0, "maximum": 1000}),
        ("lora.r", {**INTEGER, "minimum": 1, "maximum": 512}),
        ("training.max_steps", {"anyOf": [{**INTEGER, "minimum": 1}, {"type": "null"}]}),
        ("training.schedule", {"type": "string", "enum": ["cosine", "linear", "constant"]}),
        (
            "memory.micro_batch_tokens",
            {"anyOf": [{"type": "string", "const": "auto"}, {**INTEGER, "minimum": 64, "maximum": 1048576}]},
        ),
        (
            "evaluation.intensities",
            {"type": "array", "minItems": 1, "maxItems": 20, "items": {**NUMBER, "minimum": 0, "maximum": 1}},
        ),
        ("evaluation.judge_base_url", {"type": "string", "pattern": "^https?://"}),
    ],
)
def test_bounds_come_along(setting: str, expected: dict[str, Any]) -> None:
    schema = tool.config_schema()
    for name in setting.split("."):
        schema = schema["properties"][name]
    assert {key: value for key, value in schema.items() if key != "description"} == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\n", "values.yaml:1: a has no `# --` comment"),
        ("# -- A.\na:\n  b: 1\n  c: 2\n", None),
        ("a:\n  # -- B.\n  b: 1\n  c: 2\n", "values.yaml:4: a.c has no"),
        ("# -- A.\n\na: 1\n", "values.yaml:2: a `# --` comment without a value"),
    ],
)
def test_a_value_without_its_comment_is_found(text: str, said: str | None) -> None:
    if said is None:
        assert tool.documented_values(text) == {"a": "A."}
        return
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        tool.documented_values(text)


def test_the_table_has_every_value_once() -> None:
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in tool.values_table(text).splitlines()[2:]]

    def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    assert [row for row in rows if row not in ("podSecurityContext", "securityContext")] == list(leaves(yaml.safe_load(text)))


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one '<!-- values:begin -->'"):
        tool.with_table("# persona-train\n", "")
