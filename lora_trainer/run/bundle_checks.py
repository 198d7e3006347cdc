"""Check a finished bundle in a local folder before it is published: what it contains, and what of its claims can be proved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_trainer.base_model import Base, pickled
from lora_trainer.config import EvaluationConfig, GatesConfig
from lora_trainer.data.evaluation_prompts import evaluation_prompts
from lora_trainer.errors import ConfigError
from lora_trainer.escaping import one_line
from lora_trainer.evaluate import gates
from lora_trainer.evaluate.measures import replies_metrics, win_rate
from lora_trainer.evaluate.metrics import RunMetrics, Verdict
from lora_trainer.evaluate.questions import evaluation_id, intensities_of, prompts_digest
from lora_trainer.evaluate.rules import MODELS, ScoredReply, score_again
from lora_trainer.evaluate.sense import judged_again
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.run.bundle_files import (
    DEPTH_REPLIES_NAME,
    read_depth_replies,
    read_lines,
    read_prompt_version,
    read_replies,
)
from lora_trainer.run.identity import run_id
from lora_trainer.store.documents import parse_object, shown, validated
from lora_trainer.store.local import sha256_of
from lora_trainer.store.manifest import MANIFEST_NAME, check_run_manifest
from lora_trainer.train.adapter_format import check_adapter_folder, check_against_base, parse_settings
from lora_trainer.train.step_log import StepLog

_REQUIRED_FILES: Final = frozenset(
    {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "prompt.json",
        "response_schema.json", "persona.yaml", "metrics.json", "metrics.schema.json", "replies.jsonl", "train_log.jsonl",
        "report.html", "README.md",
    }
)  # fmt: skip
_OPTIONAL_FILES: Final = frozenset(
    {
        "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json",
        DEPTH_REPLIES_NAME,
    }
)  # fmt: skip
"""What tokenizers of some bases and versions save as well, and a deep evaluation."""
_REQUIRED_FACTS: Final = ("blood_type", "base", "data", "config", "verdict", "gate_id")
_MAX_DOCUMENT_BYTES: Final = 256 * 2**20
_MAX_NAMED: Final = 8
_TOLERANCE: Final = 1e-3
"""Libraries round differently on other processors. No threshold is finer."""


@dataclass(frozen=True, slots=True)
class CheckedBundle:
    """A bundle whose files are what its manifest says, and of the form that a run writes."""

    folder: Path
    manifest: dict[str, Any]
    metrics: RunMetrics
    replies: list[ScoredReply]
    prompt_version: int
    """Version of the prompt that the adapter was trained on."""

    @property
    def blood_type(self) -> BloodType:
        """Persona of the adapter."""
        return self.metrics.blood_type

    @property
    def verdict(self) -> Verdict:
        """The verdict that the bundle claims."""
        return self.metrics.verdict


def check_bundle(folder: Path) -> CheckedBundle:
    """Check everything in `folder` that can be checked without its base. Raise `ConfigError` with the problems."""
    manifest = _manifest(folder)
    if problems := list(_content_problems(folder, manifest)):
        raise ConfigError(problems)
    check_adapter_folder(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "response_schema.json", "metrics.schema.json"):
        document = parse_object((folder / name).read_bytes(), str(folder / name))
        if "auto_map" in document:
            raise ConfigError(f"{folder / name}: auto_map: got the name of code, expected none: a bundle runs nothing")
    prompt_version = read_prompt_version(folder, f"{folder}/")
    where = f"{folder}/metrics.json"
    metrics = validated(RunMetrics, parse_object((folder / "metrics.json").read_bytes(), where), where)
    for number, line in read_lines(folder / "train_log.jsonl", f"{folder}/train_log.jsonl"):
        validated(StepLog, line, f"{folder}/train_log.jsonl:{number}")
    replies = read_replies(folder, f"{folder}/replies.jsonl")
    if (folder / DEPTH_REPLIES_NAME).exists():
        read_depth_replies(folder, f"{folder}/{DEPTH_REPLIES_NAME}")
    if problems := list(_contradictions(folder, manifest, metrics)):
        raise ConfigError(problems)
    return CheckedBundle(folder, manifest, metrics, replies, prompt_version)


def check_base(bundle: CheckedBundle, base: Base, name: str) -> None:
    """Raise `ConfigError` unless the adapter was trained on `base` and fits it. A hub model's weights are not downloaded for it."""
    trained_on = bundle.manifest["base"]["identity"]
    if base.identity != trained_on:
        raise ConfigError(
            f"--base-model {name}: got the base {base.identity}, the adapter was trained on {one_line(trained_on, 200)}"
        )
    if base.folder is not None:
        weights = bundle.folder / "adapter_model.safetensors"
        check_against_base(check_adapter_folder(bundle.folder), base.folder, str(weights))


# -- contents -----------------------------------------------------------------------------------------------------------


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    if not path.is_file() or path.is_symlink():
        raise ConfigError(
            f"{folder}: got no finished bundle of this version, expected a folder with the manifest.json that a run writes last: "
            "<work_dir>/runs/<TYPE>/<run id>/bundle"
        )
    manifest = parse_object(_bounded(path), str(path))
    check_run_manifest(manifest, str(path), _REQUIRED_FACTS)
    return manifest


def _bounded(path: Path) -> bytes:
    if path.stat().st_size > _MAX_DOCUMENT_BYTES:
        raise ConfigError(f"{path}: got {path.stat().st_size:,} bytes, expected at most {_MAX_DOCUMENT_BYTES:,}")
    return path.read_bytes()


def _content_problems(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    names = set()
    unknown = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_symlink() or not entry.is_file(follow_symlinks=False):
            kind = "a link" if entry.is_symlink() else "a folder" if entry.is_dir() else "no regular file"
            yield f"{folder}/{one_line(entry.name)}: got {kind}, expected only the files that a run writes; remove it"
        elif entry.name in _REQUIRED_FILES | _OPTIONAL_FILES:
            names.add(entry.name)
        elif entry.name != MANIFEST_NAME:
            unknown.append(entry.name)
    yield from pickled(str(folder), unknown)
    for name in [name for name in unknown if not pickled("", [name])][:_MAX_NAMED]:
        yield f"{folder}/{one_line(name)}: got a file that no run writes into a bundle; remove it, or take the run's own folder"
    for name in sorted(_REQUIRED_FILES - names):
        yield f"{folder}/{name}: not found, and every bundle has it; run the same 'lora-trainer run' again instead"
    listed = manifest["files"]
    for name in sorted(set(listed) - names)[:_MAX_NAMED]:
        if name not in _REQUIRED_FILES:
            yield f"{folder}/{one_line(name, 200)}: listed in {MANIFEST_NAME}, but not a file of a bundle in this folder"
    for name in sorted(names):
        path = folder / name
        if name not in listed:
            yield f"{path}: not listed in {MANIFEST_NAME}; run the same 'lora-trainer run' again instead"
        elif (path.stat().st_size, sha256_of(path)) != (listed[name]["size_bytes"], listed[name]["sha256"]):
            yield f"{path}: differs from the bundle's manifest; run the same 'lora-trainer run' again instead"
        elif name != "adapter_model.safetensors" and path.stat().st_size > _MAX_DOCUMENT_BYTES:
            yield f"{path}: got {path.stat().st_size:,} bytes, expected at most {_MAX_DOCUMENT_BYTES:,}"


def _contradictions(folder: Path, manifest: Mapping[str, Any], metrics: RunMetrics) -> Iterator[str]:
    """Yield each claim that two files of the bundle make differently."""
    where = f"{folder}/{MANIFEST_NAME}"
    verdict = validated(Verdict, manifest["verdict"], f"{where}: verdict")
    claims = (
        ("run_id", manifest["run_id"], metrics.run_id),
        ("blood_type", manifest["blood_type"], str(metrics.blood_type)),
        ("gate_id", manifest["gate_id"], metrics.verdict.gate_id),
        ("verdict.passed", verdict.passed, metrics.verdict.passed),
    )
    for name, mine, theirs in claims:
        if mine != theirs:
            yield f"{where}: {name}: got {shown(mine)}, metrics.json has {shown(theirs)}; they are from different runs"
    if verdict != metrics.verdict and all(mine == theirs for _, mine, theirs in claims):
        yield f"{where}: verdict: differs from that of metrics.json"
    settings = parse_settings((folder / "adapter_config.json").read_bytes(), f"{folder}/adapter_config.json")
    lora = manifest["config"].get("lora")
    if isinstance(lora, dict) and (lora.get("r"), lora.get("alpha"), sorted(map(str, lora.get("target_modules") or []))) != (
        settings.r,
        settings.lora_alpha,
        sorted(settings.target_modules),
    ):
        yield f"{where}: config.lora: differs from r, lora_alpha or target_modules in adapter_config.json"


# -- proofs -------------------------------------------------------------------------------------------------------------


def unproven(bundle: CheckedBundle) -> list[str]:
    """Return the claims that cannot be computed again from the bundle's own files, one line each; empty if all can.

    Compute the run id from the manifest's ingredients, and the verdict from `replies.jsonl`: score every greedy reply by the rules,
    aggregate the scores, and compare the bounds with the manifest's thresholds. Take from each line what the text of its reply does
    not show: whether the model stopped, and the comparison with the training data.
    """
    return [*_unproven_run_id(bundle), *_unproven_verdict(bundle)]


def _unproven_run_id(bundle: CheckedBundle) -> Iterator[str]:
    manifest = bundle.manifest
    ingredients = manifest.get("ingredients", {})
    if run_id(ingredients) != manifest["run_id"]:
        yield "the run id is not the hash of the manifest's ingredients"
        return
    config = manifest["config"]
    facts = (
        ("prompt_version", bundle.prompt_version),
        ("blood_type", manifest["blood_type"]),
        ("data_sha256", manifest["data"]["sha256"]),
        ("base", manifest["base"]["identity"]),
        ("lora", config.get("lora")),
        ("training", config.get("training")),
    )
    if other := [name for name, value in facts if ingredients.get(name) != value]:
        yield f"the run id is a hash of other values than the manifest has: {', '.join(other)}"


def _unproven_verdict(bundle: CheckedBundle) -> Iterator[str]:
    config, evaluation = bundle.manifest["config"], bundle.metrics.evaluation
    where = f"{bundle.folder}/{MANIFEST_NAME}"
    try:
        settings = validated(EvaluationConfig, config.get("evaluation"), f"{where}: config.evaluation", strict=False)
        thresholds = validated(GatesConfig, config.get("gates"), f"{where}: config.gates", strict=False)
    except ConfigError as error:
        yield f"the thresholds can't be read: {error.problems[0]}"
        return
    if evaluation_id(settings, evaluation.prompts_sha256, bundle.prompt_version) != evaluation.evaluation_id:
        yield "another version measured the replies, or with other settings than the manifest has (evaluation_id)"
        return
    greedy = {model: [reply for reply in bundle.replies if (reply.model, reply.decoding) == (model, "greedy")] for model in MODELS}
    if problem := _question_problem(greedy["adapter"], greedy["base"], bundle, settings):
        yield f"replies.jsonl: {problem}"
        return
    for model in MODELS:
        for number, (claimed, again) in enumerate(zip(greedy[model], score_again(greedy[model], bundle.blood_type), strict=True)):
            # only a judge of sense could give its scores again
            mine, theirs = (reply.model_dump(mode="json", exclude={"sense"}) for reply in (again, claimed))
            if not _agree(mine, theirs):
                yield f"replies.jsonl: the rules find something else in the {model}'s greedy reply {number + 1} than its line has"
                return
    measured = evaluation.greedy.model_copy(
        update={
            "adapter": replies_metrics(greedy["adapter"], bundle.blood_type, settings),
            "base": replies_metrics(greedy["base"], bundle.blood_type, settings),
            "win_rate": win_rate(greedy["adapter"], greedy["base"], settings),
        }
    )
    if not _agree(measured.model_dump(mode="json"), evaluation.greedy.model_dump(mode="json")):
        yield "metrics.json has other numbers than replies.jsonl gives"
        return
    try:
        sense = judged_again(evaluation.sense, greedy["adapter"]) if evaluation.sense is not None else None
    except ValueError as error:
        yield f"metrics.json: {error}"
        return
    verdict = gates.decide(evaluation.model_copy(update={"greedy": measured, "sense": sense}), thresholds)
    # what to do about a missed gate is words, which each version chooses
    mine, theirs = (one.model_dump(mode="json", exclude={"gates": {"__all__": {"advice"}}}) for one in (verdict, bundle.verdict))
    if not _agree(mine, theirs):
        yield "the manifest's thresholds give another verdict"


def _question_problem(
    adapter: Sequence[ScoredReply], base: Sequence[ScoredReply], bundle: CheckedBundle, settings: EvaluationConfig
) -> str:
    """Return why the greedy replies are not one of each model to each question; empty if they are."""
    evaluation = bundle.metrics.evaluation
    per_prompt = min(settings.intensities_per_prompt, len(settings.intensities))
    # metrics.json can claim any number of prompts, and a list of that length would fill the memory
    count = len(adapter) // per_prompt
    expected = [
        (prompt, intensity) for prompt in range(count) for intensity in intensities_of(prompt, settings.intensities, per_prompt)
    ]
    asked = [[(reply.prompt, reply.intensity) for reply in replies] for replies in (adapter, base)]
    if not adapter or evaluation.prompts != count or asked != [expected, expected]:
        return f"got {len(adapter)} and {len(base)} greedy replies, expected one of each model to each question"
    told = [[(reply.feeling, reply.summary, reply.input, reply.tags) for reply in replies] for replies in (adapter, base)]
    if told[0] != told[1]:
        return "adapter and base were asked different questions"
    bundled = evaluation_prompts()
    if evaluation.prompts_sha256 == prompts_digest(bundled):
        questions = [
            (str(prompt.context.current_emotion.type), prompt.context.summary, prompt.input, prompt.tags) for prompt in bundled
        ]
        if told[0] != [question for question in questions for _ in range(per_prompt)]:
            return "got other questions than those of prompts_sha256"
    return ""


def _agree(mine: Any, theirs: Any) -> bool:
    """Return whether two JSON values are equal up to rounding."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(_agree(mine[name], theirs[name]) for name in mine)
    if isinstance(mine, list) and isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(_agree, mine, theirs))
    if type(mine) is float or type(theirs) is float:
        return isinstance(mine, int | float) and isinstance(theirs, int | float) and abs(mine - theirs) <= _TOLERANCE
    return json.dumps(mine) == json.dumps(theirs)
