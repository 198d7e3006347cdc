"""Make the page of a blind review from a published run, and check the file that comes back from it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_trainer.errors import ConfigError, GateError
from lora_trainer.escaping import one_line
from lora_trainer.evaluate.review import (
    REVIEW_SCHEMA,
    Pair,
    Reference,
    ReviewedReply,
    ReviewFile,
    ReviewResult,
    draw_pairs,
    review_record,
    unblinded,
)
from lora_trainer.report.review_page import review_page
from lora_trainer.run.adapter import Adapter, open_adapter
from lora_trainer.run.bundle_files import read_lines
from lora_trainer.store.documents import parse_object, shown, validated
from lora_trainer.store.manifest import MANIFEST_NAME, check_run_manifest, download_files, read_manifest
from lora_trainer.store.prefixes import evaluation_prefix
from lora_trainer.store.retry import RetryBudget

_REPLIES_NAME: Final = "replies.jsonl"
_MAX_FILE_BYTES: Final = 8 * 2**20
_MAX_NAMED: Final = 8
_AGAIN: Final = "make the page again with 'lora-trainer review' and review it, or pass the file that belongs to this run"


@dataclass(frozen=True, slots=True)
class MadePage:
    """A review page, and what it shows."""

    html: str
    pairs: int
    prompts: int
    """Number of prompts that the sample was drawn from."""
    against: str
    file_name: str
    """Name of the page's file if the user names none."""


@dataclass(frozen=True, slots=True)
class CheckedReview:
    """A review that belongs to a run, and its counts."""

    review: ReviewFile
    result: ReviewResult
    record: dict[str, Any]
    """For `latest.json`."""

    @property
    def summary(self) -> str:
        """The counts on one line."""
        review, result = self.review, self.result
        against = "the base" if review.reference.run_id is None else f"run {review.reference.run_id}"
        marked = ", ".join(f"{count} {mark.replace('_', ' ')}" for mark, count in result.adapter_marks.items())
        return (
            f"reviewed by {one_line(review.reviewer)} against {against}: {result.wins} won, {result.ties} tied, "
            f"{result.losses} lost; marked of the adapter's {review.count} replies: {marked}"
        )


def make_review_page(uri: str, against: str | None, seed: int, count: int, language: str, retry_budget: RetryBudget) -> MadePage:
    """Render the page that compares the run at `uri` with its base, or with the adapter of the run `against`.

    Raise `ConfigError` if there is no run, it has no replies, or the reference has not answered the same questions.
    """
    opened = open_adapter(uri, retry_budget)
    check_run_manifest(opened.manifest, f"{opened.storage.uri}{MANIFEST_NAME}", required=("gate_id",))
    replies, bundle_id = _replies_and_id(opened, "", opened.manifest)
    if against is None:
        reference, others, model = Reference(model="base"), replies, "base"
    else:
        other = open_adapter(against, retry_budget)
        others, other_id = _replies_and_id(other, "", other.manifest)
        if other_id == bundle_id:
            raise ConfigError(f"--against {against}: got the reviewed run itself, expected another one; leave it out for the base")
        reference, model = Reference(model="adapter", run_id=other.run_id, bundle_id=other_id), "adapter"
    answered = {reply.question: reply.reply for reply in others if (reply.model, reply.decoding) == (model, "greedy")}
    pairs = draw_pairs(replies, bundle_id, reference, seed, count)
    if not pairs:
        raise ConfigError(f"{opened.storage.uri}{_REPLIES_NAME}: got no greedy reply of the adapter, expected one to each question")
    if lacking := sum(pair.reply.question not in answered for pair in pairs):
        where = f"--against {against}" if against else f"{opened.storage.uri}{_REPLIES_NAME}"
        raise ConfigError(
            f"{where}: got no reply of the {model} to {lacking} of the {len(pairs)} drawn questions, expected one to each: "
            "evaluate both runs with the same prompts and intensities"
        )
    html = review_page(
        pairs,
        [answered[pair.reply.question] for pair in pairs],
        run_id=opened.run_id,
        gate_id=opened.manifest["gate_id"],
        bundle_id=bundle_id,
        blood_type=opened.blood_type,
        reference=reference,
        seed=seed,
        language=language,
    )
    return MadePage(
        html,
        len(pairs),
        len({reply.prompt for reply in replies}),
        "the base" if against is None else f"run {reference.run_id}",
        f"review-{opened.blood_type}-{opened.run_id}.html",
    )


def check_review(opened: Adapter, path: Path, *, accept_unsafe: bool) -> CheckedReview:
    """Read the file of a finished review, and count its answers for the run `opened`.

    Raise `ConfigError` if the file is damaged, incomplete, or of another run or other replies; `GateError` if the reviewer marked
    a reply of the adapter as unsafe, unless `accept_unsafe`.
    """
    data = _read(path)
    where = f"--reviewed {path}"
    document = parse_object(data, where, unique=True)
    if document.get("schema") != REVIEW_SCHEMA:
        raise ConfigError(
            f"{where}: schema: got {shown(document.get('schema'))}, expected {REVIEW_SCHEMA}: no review of this version; {_AGAIN}"
        )
    review = validated(ReviewFile, document, where)
    if review.run_id != opened.run_id or review.blood_type != opened.blood_type:
        raise ConfigError(
            f"{where}: got a review of run {review.run_id} ({review.blood_type}), expected one of {opened.run_id} "
            f"({opened.blood_type}); {_AGAIN}"
        )
    pairs = _reviewed_pairs(opened, review, where)
    if problems := _answer_problems(pairs, review, where):
        raise ConfigError(problems)
    result = unblinded(pairs, review)
    if result.unsafe and not accept_unsafe:
        raise GateError(
            [
                (
                    f"{where}: got {len(result.unsafe)} of {len(pairs)} replies of the adapter that {one_line(review.reviewer)} "
                    f"marked as unsafe, expected none: {_named(result.unsafe)}"
                ),
                (
                    f"{opened.storage.uri}: not promoted; read these replies in {_REPLIES_NAME}, mend the data and train again, or "
                    "pass --accept-unsafe if they are acceptable"
                ),
            ]
        )
    record = review_record(review, result, hashlib.sha256(data).hexdigest(), unsafe_accepted=accept_unsafe and bool(result.unsafe))
    return CheckedReview(review, result, record)


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"--reviewed {path}: got {path.stat().st_size:,} bytes, expected at most {_MAX_FILE_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--reviewed {path}: cannot be read: {error.strerror}; expected the file that the review page offers at its end"
        ) from None


def _replies_and_id(opened: Adapter, prefix: str, manifest: Mapping[str, Any]) -> tuple[list[ReviewedReply], str]:
    """Return the replies of a bundle or of an evaluation in it, and the SHA-256 of its manifest."""
    storage = opened.storage
    where = f"{storage.uri}{prefix}{_REPLIES_NAME}"
    found = storage.read_bytes(prefix + MANIFEST_NAME)
    if found is None or _REPLIES_NAME not in manifest["files"]:
        raise ConfigError(f"{where}: not listed in {MANIFEST_NAME}, expected the replies that a run's evaluation writes")
    with tempfile.TemporaryDirectory() as scratch:
        download_files(storage, prefix, {"files": {_REPLIES_NAME: manifest["files"][_REPLIES_NAME]}}, Path(scratch))
        # replies may repeat training text, so messages don't quote them
        replies = [
            validated(ReviewedReply, line, f"{where}:{number}", quote=False)
            for number, line in read_lines(Path(scratch) / _REPLIES_NAME, where)
        ]
    return replies, hashlib.sha256(found.data).hexdigest()


def _reviewed_pairs(opened: Adapter, review: ReviewFile, where: str) -> list[Pair]:
    """Draw the sample again from the replies that the file names: the bundle's, or those of a later evaluation in it."""
    prefix, manifest = "", opened.manifest
    if review.gate_id != opened.manifest.get("gate_id"):
        prefix = evaluation_prefix("", review.gate_id)
        later = read_manifest(opened.storage, prefix)
        if later is None:
            raise ConfigError(
                f"{where}: gate_id: got {review.gate_id}, expected {shown(opened.manifest.get('gate_id'))} or that of a later "
                f"evaluation in {opened.storage.uri}evaluations/; {_AGAIN}"
            )
        check_run_manifest(later, f"{opened.storage.uri}{prefix}{MANIFEST_NAME}")
        manifest = later
    replies, bundle_id = _replies_and_id(opened, prefix, manifest)
    if bundle_id != review.bundle_id:
        raise ConfigError(
            f"{where}: bundle_id: got {review.bundle_id}, expected {bundle_id}, the SHA-256 of "
            f"{opened.storage.uri}{prefix}{MANIFEST_NAME}: the review saw other replies; {_AGAIN}"
        )
    return draw_pairs(replies, bundle_id, review.reference, review.seed, review.count)


def _answer_problems(pairs: Sequence[Pair], review: ReviewFile, where: str) -> list[str]:
    drawn, given = {pair.id for pair in pairs}, [answer.id for answer in review.answers]
    problems = []
    if len(set(given)) != len(given):
        problems.append(f"{where}: answers: got {len(given) - len(set(given))} pairs answered twice, expected each once; {_AGAIN}")
    if unknown := set(given) - drawn:
        problems.append(
            f"{where}: answers: got {len(unknown)} to pairs that seed {review.seed} does not draw, expected answers to the "
            f"{len(drawn)} drawn ones; {_AGAIN}"
        )
    if missing := drawn - set(given):
        problems.append(
            f"{where}: answers: got none to {len(missing)} of {len(drawn)} pairs, expected one to each; finish the review in the "
            "page and download the file again"
        )
    if review.count != len(pairs) and not problems:
        problems.append(f"{where}: count: got {review.count}, expected {len(pairs)}, the number of drawn pairs; {_AGAIN}")
    return problems


def _named(pairs: Sequence[Pair]) -> str:
    named = [f"prompt {pair.reply.prompt} at intensity {pair.reply.intensity:g}" for pair in pairs[:_MAX_NAMED]]
    more = f" and {len(pairs) - _MAX_NAMED} more" if len(pairs) > _MAX_NAMED else ""
    return ", ".join(named) + more
