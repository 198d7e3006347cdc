"""Merge settings from the command line > environment > YAML file > defaults.

pydantic-settings cannot do two things that users of a batch job need: name the source of a wrong value, and refuse an
unknown `LORA_TRAINER_*` variable (docs/adr/0003-configuration-sources.md).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Final, get_args, get_origin

from pydantic import ValidationError

from lora_trainer.config import ENVIRONMENT_PREFIX, RunConfig, environment_name, setting_fields, setting_names
from lora_trainer.config_file import config_path, read_config_file
from lora_trainer.errors import ConfigError
from lora_trainer.lists import listed
from lora_trainer.persona.vocabulary import BloodType, parse_blood_types
from lora_trainer.redaction import redacted
from lora_trainer.uris import shown

CONFIG_FILE_VARIABLE: Final = "LORA_TRAINER_CONFIG"
_SHOWN_CHARACTERS: Final = 200
_SHOWN_PROBLEMS: Final = 50
_QUOTES: Final = "\"'"


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
    if named := config_file or environment.get(CONFIG_FILE_VARIABLE):
        try:
            path = config_path(named)
            # the file's name may contain braces
            escaped = str(path).replace("{", "{{").replace("}", "}}")
            sources.append(Source(read_config_file(path), f"{escaped}: {{key}}"))
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


def _read_environment(environment: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    known = {environment_name(dotted): dotted for dotted in setting_names()}
    values: dict[str, Any] = {}
    problems = []
    for variable, text in sorted(environment.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == CONFIG_FILE_VARIABLE:
            continue
        if variable not in known:
            problems.append(f"{variable}: no such setting; {_nearest(variable, list(known), ENVIRONMENT_PREFIX)}")
        elif len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES and not _is_list(known[variable]):
            problems.append(
                f"{variable}: got {_shortened(text)}; the quotes are part of the value, because docker's --env-file and Kubernetes "
                f"do not remove them; write {variable}=value"
            )
        elif text != "":
            values[known[variable]] = _text_or_none(known[variable], text)
    return _nest(values), problems


def parse_override(text: str) -> tuple[str, Any]:
    """Parse `training.epochs=1` from `--set` into (setting, value). Raise `ConfigError` for an unknown setting."""
    dotted, value = _setting_and_text(text, "--set", "SETTING=VALUE")
    return dotted, _text_or_none(dotted, value)


def parse_values(text: str) -> tuple[str, list[Any]]:
    """Parse `training.epochs=1,2` from `--try` into (setting, values). Raise `ConfigError` for an unknown setting."""
    dotted, values = _setting_and_text(text, "--try", "SETTING=VALUE,VALUE,...")
    return dotted, [_text_or_none(dotted, str(value)) for value in listed(values)]


def _setting_and_text(text: str, option: str, expected: str) -> tuple[str, str]:
    dotted, equals, value = text.partition("=")
    if not equals or dotted not in set(setting_names()):
        # leave the value out: someone may have passed a secret by mistake
        shown = f"{dotted}=…" if equals else dotted
        raise ConfigError(f"{option} {shown}: expected {expected}; {_nearest(dotted, list(setting_names()))}")
    return dotted, value


def _is_list(dotted: str) -> bool:
    return dotted == "blood_type" or get_origin(dict(setting_fields())[dotted].annotation) is tuple


def _text_or_none(dotted: str, text: str) -> str | None:
    """Return None for `none` where the setting allows it, otherwise `text`, which validation converts."""
    if text.lower() in ("none", "null") and NoneType in get_args(dict(setting_fields())[dotted].annotation):
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
            odd = "".join(sign for sign in dotted if not sign.isprintable())
            meant = dotted.translate(dict.fromkeys(map(ord, odd), ""))
            said = f"no such setting; {_nearest(meant[:_SHOWN_CHARACTERS], names)}"
            if odd:
                name = unicodedata.name(odd[0], "a control character")
                said += f" Its name contains U+{ord(odd[0]):04X} {name}; indent with plain spaces, and type the name again"
            yield f"{place[-_SHOWN_CHARACTERS * 2 :]}: {said}"
        elif problem["type"] == "missing":
            option = "--" + dotted.replace("_", "-")
            yield f"{dotted}: not given; pass {option}, or set {environment_name(dotted)}, or '{dotted}:' in the configuration file"
        elif problem["type"] in ("model_type", "model_attributes_type"):
            example = next(name for name in names if name.startswith(f"{dotted}."))
            yield (
                f"{place}: got {_shortened(problem['input'])}; expected settings below '{dotted}:', each on a line of its own and "
                f"with a space after its colon, such as '{example.removeprefix(dotted + '.')}: ...'"
            )
        elif problem["input"] is None:
            yield f"{place}: got nothing; expected a value, or no such line"
        else:
            said = problem["msg"].removeprefix("Value error, ")
            said += _percentage(dotted, problem)
            if problem["type"] == "string_type" and isinstance(problem["input"], bool | int | float):
                said += "; put it in quotes"
            yield f"{place}: got {_shortened(problem['input'])}; {said[0].lower()}{said[1:]}"


def _percentage(dotted: str, problem: Mapping[str, Any]) -> str:
    """Return a hint for a share or an intensity that was written as a percentage, an empty string for other problems."""
    if not dotted.startswith("gates.") and not dotted.endswith(("fraction", "intensities", "dropout", "top_p")):
        return ""
    if problem["type"] not in ("less_than", "less_than_equal"):
        return ""
    value = float(problem["input"])
    return f"; {problem['input']} looks like a percentage: write {value / 100:g}" if 1 < value <= 100 else ""


def _place(sources: list[Source], location: list[str]) -> str:
    """Name the strongest of `sources` that sets the setting, in the user's words."""
    dotted = ".".join(location)
    return next((source.place(dotted) for source in reversed(sources) if _holds(source.values, location)), dotted)


def _shortened(value: object) -> str:
    text = redacted(repr(shown(value) if isinstance(value, str) else value))
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
    own = name.removeprefix(shared)
    # `epochs` and `train.epochs` have the right last part
    close = [shared + found for found in bare if re.split(r"\.|__", found)[-1] == re.split(r"\.|__", own)[-1]]
    close += [shared + found for found in difflib.get_close_matches(own, bare, n=2, cutoff=0.6)]
    close = list(dict.fromkeys(close))[:2]
    return f"did you mean {' or '.join(close)}?" if close else "see 'lora-trainer show-config' for all of them"
