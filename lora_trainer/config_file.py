"""Read the configuration file: plain YAML with the numbers and booleans of YAML 1.2, in UTF-8."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic.fields import FieldInfo

from lora_trainer.config import Location, setting_fields
from lora_trainer.errors import ConfigError
from lora_trainer.uris import local_path, parse_uri, shown

_MAX_FILE_BYTES: Final = 2**20
"""Generous: a configuration file with every setting and its comment takes 10 KB."""
_MAX_NODES: Final = 10_000
_SHOWN_CHARACTERS: Final = 80
_UTF16_OR_32: Final = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_WIDE_PUNCTUATION: Final = re.compile("[：，“”‘’｛｝［］＃]")
_KINDS: Final = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


def config_path(text: str | Path) -> Path:
    """Return the configuration file that `text` names, with `~` expanded. Raise `ConfigError` for a URI of another kind."""
    try:
        return local_path(str(text))
    except ValueError as error:
        raise ConfigError(f"{shown(str(text))}: cannot read the configuration file: {error}") from None


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the settings in `path`, nested as in `RunConfig`. Relative paths are relative to the file's folder.

    `training.epochs: 3` is read like `training: {epochs: 3}`, and a section without content sets nothing. Raises `ConfigError`.
    """
    loaded = _loaded(path)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        kind = _KINDS.get(type(loaded), f"a {type(loaded).__name__}")
        raise ConfigError(f"{path}: got {kind}, expected a mapping of settings, such as 'training: {{epochs: 3}}'")
    fields = dict(setting_fields())
    sections = {name.rpartition(".")[0] for name in fields} - {""}
    found: dict[str, tuple[str, Any]] = {}
    problems: list[str] = []
    for dotted, written, value in _leaves(loaded, set(fields), sections):
        if not isinstance(written, str):
            problems.append(f"{path}: got the key {written!r:.{_SHOWN_CHARACTERS}}, expected the name of a setting")
        elif twin := next((other for other in found if _is_same_or_above(other, dotted)), None):
            problems.append(
                f"{path}: {dotted:.{_SHOWN_CHARACTERS}}: got it twice, as '{found[twin][0]:.{_SHOWN_CHARACTERS}}' and as "
                f"'{written:.{_SHOWN_CHARACTERS}}'; expected one of them"
            )
        else:
            found[dotted] = (written, value)
    if problems:
        raise ConfigError(problems)
    nested: dict[str, Any] = {}
    for dotted, (_, value) in found.items():
        section = nested
        *parents, leaf = dotted.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        field = fields.get(dotted)
        section[leaf] = _from_folder(path, dotted, value) if field is not None and _is_location(field) else value
    return nested


def _is_same_or_above(one: str, other: str) -> bool:
    return one == other or other.startswith(f"{one}.") or one.startswith(f"{other}.")


def _leaves(
    mapping: Mapping[Any, Any], settings: set[str], sections: set[str], dotted_before: str = "", written_before: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name, the spelling (`epochs` under `training`: `training: epochs`) and the value of each setting."""
    for key, value in mapping.items():
        if not isinstance(key, str):
            yield dotted_before, key, value
            continue
        dotted, written = f"{dotted_before}{key}", f"{written_before}{key}"
        if value is None and dotted in sections:
            continue
        if isinstance(value, dict) and dotted not in settings and (value or dotted in sections):
            yield from _leaves(value, settings, sections, f"{dotted}.", f"{written}: ")
        else:
            yield dotted, written, value


def _from_folder(path: Path, dotted: str, value: Any) -> Any:
    """Return `value`, or the absolute path if it is a path that is relative to the folder of `path`."""
    if not isinstance(value, str) or (dotted == "base.model" and not value.startswith(("./", "../"))):
        # a bare "org/name" is a hub id
        return value
    try:
        parsed = parse_uri(value)
    except ValueError:
        # validation reports it with its source
        return value
    if parsed.scheme or value.startswith(("/", "~")):
        return value
    trailing = "/" if value.endswith("/") else ""
    return os.path.normpath(path.absolute().parent / value) + trailing


def _is_location(field: FieldInfo) -> bool:
    return field.annotation is Path or any(isinstance(mark, Location) for mark in field.metadata)


def _loaded(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        # ValueError: the path contains a NUL
        said = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(f"{path}: cannot read the configuration file: {said}; check the path given to --config") from None
    if len(raw) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: got more than {_MAX_FILE_BYTES:,} bytes, expected a file of settings; check the path")
    text = _decoded(path, raw)
    try:
        return _load_plain_yaml(text)
    except RecursionError:
        raise ConfigError(f"{path}: not plain YAML: nested too deeply; only mappings, lists and scalars are accepted") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not plain YAML: {_explained(error, text, mark)}") from None


def _decoded(path: Path, raw: bytes) -> str:
    is_wide = raw.startswith(_UTF16_OR_32) or raw.count(b"\0") > len(raw) / 4
    encoding = "UTF-16 or UTF-32" if is_wide else None
    if encoding is None:
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            try:
                # latin-1 accepts every byte, so only CP949 can be recognised
                hangul = re.search("[가-힣]", raw.decode("cp949"))
            except UnicodeDecodeError:
                hangul = None
            encoding = "CP949 (EUC-KR)" if hangul else None
            path = Path(f"{path}:{line}")
    known = f"; it looks like {encoding}" if encoding else ""
    raise ConfigError(f"{path}: not UTF-8{known}; expected a UTF-8 file: save it again in that encoding")


def _explained(error: yaml.YAMLError, text: str, mark: yaml.Mark | None) -> str:
    """Return PyYAML's own words, or better ones for what people often get wrong."""
    said = str(getattr(error, "problem", None) or "a character that YAML does not allow")
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "\\t" in said or "\t" in line[: len(line) - len(line.lstrip())]:
        return "a tab; YAML is indented with spaces"
    if "another document" in said:
        return "a second document after '---'; expected one"
    around = "".join(lines[max(0, mark.line - 1) : mark.line + 1]) if mark else ""
    if wide := _WIDE_PUNCTUATION.search(around):
        return f"{said}; the character {wide[0]} is not the one of the keyboard's English layout"
    return f"{said}; only mappings, lists and scalars are accepted"


class _PlainLoader(yaml.SafeLoader):
    """Loads plain values only, with the numbers and booleans of YAML 1.2.

    YAML 1.1 reads `off` as false, `1:30` as 90, `010` as 8 and `1e-4` as text. A value that does not match its tag raises an
    error with its line.
    """

    # not a ClassVar, because PyYAML's types declare it on the instance
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        # PyYAML's own constructors fail on a number of 5,000 digits, `!!bool maybe`
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            raise yaml.constructor.ConstructorError(None, None, "a value that does not match its type", node.start_mark) from None


def _construct_int(loader: _PlainLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 0) if text.startswith(("0x", "0o")) else int(text, 10)


def _construct_float(loader: _PlainLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_PlainLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def _load_plain_yaml(text: str) -> Any:
    """Return the one document in `text`. Raise `YAMLError`, or `RecursionError` if it is nested too deeply."""
    loader = _PlainLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check_nodes(root)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _check_nodes(root: yaml.Node) -> None:
    """Refuse duplicate keys, and aliases that would expand the document many times over or without end."""
    waiting, seen = [root], 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if seen > _MAX_NODES:
            # PyYAML expands an alias to the same node, so this counts each use and stops at recursive aliases
            problem = f"more than {_MAX_NODES:,} values with its aliases expanded"
            raise yaml.constructor.ConstructorError(None, None, problem, root.start_mark)
        if isinstance(node, yaml.MappingNode):
            known = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in known:
                    problem = f"a duplicate key, '{key.value:.{_SHOWN_CHARACTERS}}'"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                known.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            waiting.extend(part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
