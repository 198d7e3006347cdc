"""Turn the values of `--try` into the trials of a sweep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_trainer.config import RunConfig
from lora_trainer.config_sources import parse_values, settle
from lora_trainer.errors import ConfigError

MAX_TRIALS: Final = 32
TRIED: Final = (
    "training.learning_rate",
    "training.epochs",
    "training.max_steps",
    "training.sequences_per_step",
    "training.schedule",
    "training.warmup_fraction",
    "training.weight_decay",
    "training.max_grad_norm",
    "training.seed",
    "lora.r",
    "lora.alpha",
    "lora.dropout",
)
"""Settings that a sweep can try: they leave the base and the held-out records alone, so held-out losses can be compared."""
_OTHER_RECORDS: Final = "it decides which records are held out, and losses on different records can't be compared"
_OTHER_MEASURE: Final = "it decides how the held-out loss is used, which has to be the same for all trials"
_OTHER_BASE: Final = "it changes the loaded base, which all trials share"
_REASONS: Final[Mapping[str, str]] = {
    "training.held_out_fraction": _OTHER_RECORDS,
    "training.max_length_tokens": _OTHER_RECORDS,
    "training.held_out_measurements_per_epoch": _OTHER_MEASURE,
    "training.keep": _OTHER_MEASURE,
    "training.early_stopping": _OTHER_MEASURE,
    "training.quantization": _OTHER_BASE,
    "training.compute_dtype": _OTHER_BASE,
    "lora.target_modules": "its values are lists",
}
"""Why the other settings of the recipe can't be tried."""


@dataclass(frozen=True, slots=True)
class TrialConfig:
    """The settings of one trial."""

    tried: Mapping[str, Any]
    """The values of the settings that the trials differ in."""
    config: RunConfig


def trial_configs(tries: Sequence[str], given: Mapping[str, Any], config_file: Path | None) -> list[TrialConfig]:
    """Return one trial for each combination of the values in `tries`, such as `training.epochs=2,3`, the last varying fastest.

    `given` are the command line's other settings. Raise `ConfigError` with every problem: a setting that no sweep can try, a value
    that is not valid, one that is given twice, and fewer than 2 or more than 32 combinations.
    """
    values = _values(tries, given)
    count = math.prod(len(each) for each in values.values())
    if not 2 <= count <= MAX_TRIALS:
        what = " x ".join(f"{len(each)} of {name}" for name, each in values.items()) or "no --try"
        hint = "use 'lora-trainer run' for one" if count < 2 else "try fewer values, and narrow them in a second sweep"
        combinations = "combination" if count == 1 else "combinations"
        raise ConfigError(f"--try: got {count:,} {combinations} ({what}), expected 2 to {MAX_TRIALS}; {hint}")
    configs: list[TrialConfig] = []
    problems: dict[str, None] = {}
    for combination in itertools.product(*values.values()):
        tried = dict(zip(values, combination, strict=True))
        try:
            config = settle({**given, **tried}, config_file=config_file)
        except ConfigError as error:
            # many combinations share a value
            problems.update(dict.fromkeys(error.problems))
        else:
            configs.append(TrialConfig({name: _value_of(config, name) for name in tried}, config))
    if problems:
        raise ConfigError(list(problems))
    # 1e-4 and 0.0001 differ only as text
    if repeated := [name for name, each in values.items() if len({trial.tried[name] for trial in configs}) < len(each)]:
        raise ConfigError([f"--try {name}: got the same value twice, expected different ones" for name in repeated])
    return configs


def _values(tries: Sequence[str], given: Mapping[str, Any]) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = {}
    problems: list[str] = []
    for text in tries:
        try:
            name, found = parse_values(text)
        except ConfigError as error:
            problems.extend(error.problems)
            continue
        if problem := _problem_of(name, found, values, given):
            problems.append(f"--try {name}: {problem}")
        values[name] = found
    if problems:
        raise ConfigError(problems)
    return values


def _problem_of(name: str, found: Sequence[Any], values: Mapping[str, object], given: Mapping[str, Any]) -> str:
    if name not in TRIED:
        reason = _REASONS.get(name, "it is no part of the recipe")
        return f"can't be tried: {reason}; expected one of {', '.join(TRIED)}; --set {name}=… sets it for all trials"
    if name in values:
        return "got it twice, expected all its values in one --try"
    if name in given:
        return "got it also as a setting of its own, expected only one of the two"
    if not found or "" in found:
        return "got an empty value, expected values with commas between them"
    return ""


def _value_of(config: RunConfig, name: str) -> Any:
    section, leaf = name.split(".")
    return getattr(getattr(config, section), leaf)
