"""Merge settings from the command line > environment > YAML file > defaults.

pydantic-settings cannot do two things that users of a batch job need: name the source of a wrong value, and refuse an
unknown `LORA_TRAINER_*` variable (docs/adr/0003-configuration-sources.md).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Final, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lora_trainer.config import ENVIRONMENT_PREFIX, Location, RunConfig, environment_name, setting_fields, setting_names
from lora_trainer.errors import ConfigError
from lora_trainer.persona.vocabulary import BloodType, parse_blood_types
from lora_trainer.redaction import redacted

CONFIG_FILE_VARIABLE: Final = "LORA_TRAINER_CONFIG"
_MAX_FILE_BYTES: Final = 2**20
"""Generous: a configuration file with every setting and its comment takes 10 KB."""
_MAX_NODES: Final = 10_000
_SHOWN_CHARACTERS: Final = 200
_SHOWN_PROBLEMS: Final = 50


@dataclass(frozen=True, slots=True)
class Source:
    """Settings from one source, and a template that names the source in messages."""

    values: Mapping[str, Any]
    """Nested in the same way as `RunConfig`."""
    name: str
    """`{key}` is replaced by the dotted setting, `{env}` by its environment variable."""

    def place(self, dotted: str) -> str:
        """Return where the setting `dotted` came from, in the user's words."""
        return self.name.format(key=dotted, env=environment_name(dotted))


def settle(
    cli: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    config_file: Path | None = None,
    fallback: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Like `settle_each`, but for a single persona. Raise `ConfigError` if the sources name several."""
    config, *more = settle_each(cli, environment, config_file, fallback)
    if more:
        named = ", ".join(each.blood_type for each in (config, *more))
        raise ConfigError(f"blood_type: got {named}, expected one: only 'lora-trainer run' takes several")
    return config


def settle_each(
    cli: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    config_file: Path | None = None,
    fallback: Mapping[str, Any] | None = None,
) -> tuple[RunConfig, ...]:
    """Merge the sources into one `RunConfig` per persona in `blood_type`. The results differ only in that setting.

    `cli` maps the dotted settings of the command line to their values. `fallback` does the same for settings that `run`
    requires and another command does not. `environment` defaults to `os.environ`.
    Raise `ConfigError` with every problem of every source at once.
    """
    environment = os.environ if environment is None else environment
    problems: list[str] = []
    sources: list[Source] = []
    named_file = config_file or (Path(environment[CONFIG_FILE_VARIABLE]) if environment.get(CONFIG_FILE_VARIABLE) else None)
    if named_file is not None:
        try:
            # the file's name may contain braces
            escaped = str(named_file).replace("{", "{{").replace("}", "}}")
            sources.append(Source(_read_file(named_file), f"{escaped}: {{key}}"))
        except ConfigError as error:
            problems.extend(error.problems)
    from_environment, unknown = _read_environment(environment)
    problems.extend(unknown)
    sources.append(Source(from_environment, "{env}"))
    sources.append(Source(_nest(cli), "command line: {key}"))
    merged = _nest(fallback or {})
    for source in sources:
        merged = _merge(merged, source.values)
    blood_types: tuple[BloodType, ...] = ()
    if "blood_type" in merged:
        try:
            blood_types = parse_blood_types(merged["blood_type"])
        except ValueError as error:
            problems.append(f"{_place(sources, ['blood_type'])}: {error}")
        # without a valid persona, use A to validate the other settings anyway
        merged["blood_type"] = next(iter(blood_types), BloodType.A)
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        problems.extend(_explain(error, sources))
        if len(problems) > _SHOWN_PROBLEMS:
            problems[_SHOWN_PROBLEMS:] = [f"and {len(problems) - _SHOWN_PROBLEMS:,} more problems: is this a file of settings?"]
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return tuple(config.model_copy(update={"blood_type": blood_type}) for blood_type in blood_types)


def _read_file(path: Path) -> dict[str, Any]:
    """Read the YAML mapping in `path`. Resolve relative paths against the file's folder."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        # ValueError: the path contains a NUL
        said = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(f"{path}: cannot read the configuration file: {said}; check the path given to --config") from None
    if len(raw) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: got more than {_MAX_FILE_BYTES:,} bytes, expected a file of settings; check the path")
    try:
        loaded = _load_plain_yaml(raw.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        kinds = {UnicodeDecodeError: "not UTF-8", RecursionError: "nested too deeply"}
        said = getattr(error, "problem", None) or kinds.get(type(error)) or "a character that YAML does not allow"
        raise ConfigError(f"{where}: not plain YAML: {said}; only mappings, lists and scalars are accepted") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(
            f"{path}: got a {type(loaded).__name__}, expected a mapping of settings, such as 'training: {{epochs: 3}}'"
        )
    for dotted in (name for name, field in setting_fields() if _is_location(field)):
        section: Any = loaded
        *parents, leaf = dotted.split(".")
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(value := section.get(leaf), str) and _is_relative_path(dotted, value):
            trailing = "/" if value.endswith("/") else ""
            section[leaf] = os.path.normpath(path.absolute().parent / value) + trailing
    return loaded


class _PlainLoader(yaml.SafeLoader):
    """Loads plain values only. A value that does not match its tag raises an error with its line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        # PyYAML's own constructors fail on `2026-13-01`, a number of 5,000 digits, `!!bool maybe`
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            raise yaml.constructor.ConstructorError(None, None, "a value that does not match its type", node.start_mark) from None


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
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) != len(keys):
                raise yaml.constructor.ConstructorError(None, None, "a duplicate key", node.start_mark)
            waiting.extend(part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)


def _is_location(field: FieldInfo) -> bool:
    return field.annotation is Path or any(isinstance(mark, Location) for mark in field.metadata)


def _is_relative_path(dotted: str, value: str) -> bool:
    if not value or "://" in value or value.startswith(("/", "~")):
        return False
    # a bare "org/name" is a hub id
    return dotted != "base.model" or value.startswith(("./", "../"))


def _read_environment(environment: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    known = {environment_name(dotted): dotted for dotted in setting_names()}
    values: dict[str, Any] = {}
    problems = []
    for variable, text in sorted(environment.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == CONFIG_FILE_VARIABLE:
            continue
        if variable not in known:
            problems.append(f"{variable}: no such setting; {_nearest(variable, list(known), ENVIRONMENT_PREFIX)}")
        elif text != "":
            values[known[variable]] = _list_or_text(known[variable], text)
    return _nest(values), problems


def parse_override(text: str) -> tuple[str, Any]:
    """Parse `training.epochs=1` from `--set` into (setting, value). Raise `ConfigError` for an unknown setting."""
    dotted, equals, value = text.partition("=")
    if not equals or dotted not in set(setting_names()):
        # leave the value out: someone may have passed a secret by mistake
        shown = f"{dotted}=…" if equals else dotted
        raise ConfigError(f"--set {shown}: expected SETTING=VALUE; {_nearest(dotted, list(setting_names()))}")
    return dotted, _list_or_text(dotted, value)


def _list_or_text(dotted: str, text: str) -> Any:
    """Convert text for pydantic: a list from JSON or commas, `none` to None where the setting allows it."""
    annotation = dict(setting_fields())[dotted].annotation
    if get_origin(annotation) is tuple:
        if text.lstrip().startswith("["):
            # leave invalid JSON as text: validation refuses it and names its source
            with suppress(json.JSONDecodeError):
                return json.loads(text)
        return [part.strip() for part in text.split(",")]
    if text.lower() in ("none", "null") and NoneType in get_args(annotation):
        return None
    return text


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for dotted, value in flat.items():
        section = nested
        *parents, leaf = dotted.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return nested


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _explain(error: ValidationError, sources: list[Source]) -> Iterator[str]:
    names = list(setting_names())
    found = error.errors(include_url=False)
    for problem in found:
        if problem["type"] == "too_short" and any(other["loc"][:-1] == problem["loc"] for other in found):
            # "too short" only follows from invalid elements, which get lines of their own
            continue
        # for a union, pydantic appends the branch ("auto", "int") to `loc`; strip it
        location = [str(part) for part in problem["loc"]]
        dotted = ".".join(location)
        while dotted not in names and len(location) > 1 and problem["type"] != "extra_forbidden":
            location.pop()
            dotted = ".".join(location)
        place = _place(sources, location)
        if problem["type"] == "extra_forbidden":
            yield f"{place[-_SHOWN_CHARACTERS * 2 :]}: no such setting; {_nearest(dotted[:_SHOWN_CHARACTERS], names)}"
        elif problem["type"] == "missing":
            option = "--" + dotted.replace("_", "-")
            yield f"{dotted}: not given; pass {option}, or set {environment_name(dotted)}, or '{dotted}:' in the configuration file"
        else:
            said = problem["msg"].removeprefix("Value error, ")
            yield f"{place}: got {_shortened(problem['input'])}; {said[0].lower()}{said[1:]}"


def _place(sources: list[Source], location: list[str]) -> str:
    """Name the strongest of `sources` that sets the setting, in the user's words."""
    dotted = ".".join(location)
    return next((source.place(dotted) for source in reversed(sources) if _holds(source.values, location)), dotted)


def _shortened(value: object) -> str:
    text = redacted(repr(value))
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _holds(values: Any, location: list[str]) -> bool:
    for part in location:
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _nearest(name: str, names: list[str], shared: str = "") -> str:
    """Suggest similar names. Compare them without `shared`, a prefix of all of them that would make any two look alike."""
    import difflib

    bare = [known.removeprefix(shared) for known in names]
    close = [shared + found for found in difflib.get_close_matches(name.removeprefix(shared), bare, n=2, cutoff=0.6)]
    return f"did you mean {' or '.join(close)}?" if close else "see 'lora-trainer show-config' for all of them"
