"""Generate parts of the chart: the table in its README, the schemas of its values and of `config`, and versions.

    python tools/chart_files.py --write    update charts/persona-train
    python tools/chart_files.py --check    exit 1 if something there is out of date

tests/unit/test_chart_files.py runs the same check.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

ROOT = Path(__file__).resolve().parent.parent
# import the package from the checkout, which need not be installed
sys.path.insert(0, str(ROOT))

config = importlib.import_module("lora_trainer.config")
uris = importlib.import_module("lora_trainer.uris")

CHART: Final = ROOT / "charts" / "persona-train"
BEGIN: Final = "<!-- values:begin -->"
END: Final = "<!-- values:end -->"

_KEY = re.compile(r"( *)([A-Za-z0-9-]+):(.*)")
_KEPT: Final = ("type", "enum", "const", "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "minLength", "pattern",
                "minItems", "maxItems")  # fmt: skip
# Helm's --set makes text of 0.0001 and 5e-5, and --set-string of everything. A pattern applies to text alone, a bound to numbers.
_AS_TEXT: Final = {
    "number": r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$",
    "integer": r"^[-+]?[0-9]+(\.0+)?([eE]\+?[0-9]+)?$",
    "boolean": "^(true|false)$",
}
_S3: Final = "s3://bucket/prefix/"
_FILE: Final = "file:///folder/"


def documented_values(text: str) -> dict[str, str]:
    """Return the text of each value's `# --` comment by the value's dotted name, in the order of the file.

    Raises `ValueError` for a value that is neither documented nor a section of documented ones, and for a comment without a value.
    """
    found: dict[str, str] = {}
    sections: list[tuple[int, str]] = []
    comment: list[str] = []
    documented_indent: int | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        bare = line.strip()
        if bare.startswith("# -- "):
            comment = [bare.removeprefix("# -- ")]
        elif bare.startswith("#"):
            if comment:
                comment.append(bare.removeprefix("#").strip())
        elif match := _KEY.fullmatch(line):
            indent = len(match[1])
            if documented_indent is not None and indent > documented_indent and not comment:
                continue  # within a default that is a list or a map
            sections = [section for section in sections if section[0] < indent]
            dotted = ".".join([name for _, name in sections] + [match[2]])
            is_section = not match[3].strip()
            documented_indent = None
            if comment:
                found[dotted] = " ".join(comment)
                documented_indent = indent
            elif not is_section:
                raise ValueError(f"values.yaml:{number}: {dotted} has no `# --` comment")
            if is_section:
                sections.append((indent, match[2]))
            comment = []
        elif not bare and comment:
            raise ValueError(f"values.yaml:{number}: a `# --` comment without a value behind it")
    return found


def values_table(text: str) -> str:
    """Return the values of values.yaml as a Markdown table that ends in a line break."""
    values = yaml.safe_load(text)
    lines = ["| Value | Default | Meaning |", "|---|---|---|"]
    documented = documented_values(text)
    for dotted, meaning in documented.items():
        value: Any = values
        for part in dotted.split("."):
            value = value[part]
        if isinstance(value, dict) and any(other.startswith(f"{dotted}.") for other in documented):
            shown = ""
        else:
            shown = f"`{json.dumps(value, ensure_ascii=False)}`"
        lines.append(f"| `{dotted}` | {shown} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, table: str) -> str:
    """Return `readme` with the table between its markers. Raise `ValueError` unless each marker occurs once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md: expected one '{BEGIN}' and, behind it, one '{END}'")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table}{END}{rest.split(END)[1]}"


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 7) of a settings file: `RunConfig` without required properties, and closed to unknown ones."""
    schema = config.RunConfig.model_json_schema()
    plain = _plain(schema, schema["$defs"], {name: meaning for name, _, _, meaning in config.config_table()}, "")
    prompts = plain["properties"]["evaluation"]["properties"]["prompts"]["anyOf"][0]
    # a path may lie in a volume
    prompts.update(_location([f"{_S3}prompts.jsonl", f"{_FILE}prompts.jsonl", "/folder/prompts.jsonl"], "^/[^/]|"))
    return plain


def _location(examples: list[str], accepts: str = "") -> dict[str, Any]:
    """Return the schema of a URI. Its message lists `examples` and quotes no value, which may hold a signature."""
    refused = {"anyOf": [{"not": {"pattern": accepts + uris.SCHEMA_ACCEPTS}}, {"pattern": uris.SCHEMA_REFUSES}]}
    return {"type": "string", "if": refused, "then": {"enum": examples}}


def _plain(schema: dict[str, Any], definitions: dict[str, Any], meanings: dict[str, str], dotted: str) -> dict[str, Any]:
    """Strip titles, defaults and references from pydantic's schema, so that Helm's older validators can read it."""
    if "$ref" in schema:
        return _plain(definitions[schema["$ref"].rpartition("/")[2]], definitions, meanings, dotted)
    plain = {key: schema[key] for key in _KEPT if key in schema}
    if plain.get("type") in _AS_TEXT:
        plain = {**plain, "type": [plain["type"], "string"], "pattern": _AS_TEXT[plain["type"]]}
    if dotted in meanings:
        plain["description"] = meanings[dotted]
    if "anyOf" in schema:
        plain["anyOf"] = [_plain(option, definitions, meanings, "") for option in schema["anyOf"]]
    if "items" in schema:
        plain["items"] = _plain(schema["items"], definitions, meanings, "")
    if "properties" in schema:
        plain["additionalProperties"] = False
        plain["properties"] = {
            name: _plain(part, definitions, meanings, f"{dotted}.{name}".lstrip(".")) for name, part in schema["properties"].items()
        }
    return plain


def values_schema(text: str, values: str) -> str:
    """Return values.schema.json with the schema of `config`, and with the comments of values.yaml as descriptions."""
    schema = json.loads(text)
    schema["properties"]["config"] = config_schema()
    for name in ("data", "output"):
        schema["properties"][name] = _location([_S3, _FILE])
    schema["properties"]["baseModel"]["properties"]["s3Uri"] = _location(["", _S3], "^$|")
    for dotted, meaning in documented_values(values).items():
        part = schema
        for name in dotted.split("."):
            part = part["properties"][name] if "properties" in part else {}
            if "$ref" in part:
                # a shared definition has no description for one value
                part = {}
        if part:
            part["description"] = meaning
    dumped = json.dumps(schema, indent=2, ensure_ascii=False)
    # the invisible characters that a URI must not contain
    return re.sub(r"[^\S\n ]|[\u007f-\u00ad\u180e\u200b-\u206f\ufeff]", lambda found: f"\\u{ord(found[0]):04x}", dumped) + "\n"


def app_version(text: str) -> str:
    """Return Chart.yaml with the project's version."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    return re.sub(r"(?m)^appVersion: .*$", f"appVersion: {version}", text)


def base_model(text: str) -> str:
    """Return values.yaml with the default base of `RunConfig`."""
    base = config.RunConfig.model_fields["base"].default
    text = re.sub(r"(?m)^  id: .*$", f"  id: {base.model}", text)
    return re.sub(r"(?m)^  revision: .*$", f"  revision: {base.revision}", text)


def wanted() -> Iterator[tuple[Path, str]]:
    """Yield each file that this tool updates, and its expected content."""
    values = base_model((CHART / "values.yaml").read_text(encoding="utf-8"))
    yield CHART / "values.yaml", values
    yield CHART / "Chart.yaml", app_version((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    yield CHART / "README.md", with_table((CHART / "README.md").read_text(encoding="utf-8"), values_table(values))
    yield CHART / "values.schema.json", values_schema((CHART / "values.schema.json").read_text(encoding="utf-8"), values)


def main() -> int:
    """Write or check the files. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="update the chart")
    mode.add_argument("--check", action="store_true", help="say which file is out of date")
    arguments = parser.parse_args()
    outdated = 0
    for path, text in wanted():
        if path.read_text(encoding="utf-8") == text:
            continue
        outdated += 1
        if arguments.write:
            path.write_text(text, encoding="utf-8")
        print(
            f"{path.relative_to(ROOT)}: {'written' if arguments.write else 'out of date; run python tools/chart_files.py --write'}"
        )
    return 1 if outdated and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
