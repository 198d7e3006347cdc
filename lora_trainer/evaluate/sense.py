"""Judge whether an adapter's replies make sense, by the first judge that passes its examination.

The judges, in order: the model behind the configured endpoint, if there is one; a probe of the base's hidden states; the base's
own answer to a question. Examinations are kept in the work folder, because they depend on the base and the examples, not on the
adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, NamedTuple, Protocol, assert_never

from pydantic import ValidationError

from lora_trainer import logs
from lora_trainer.config import EvaluationConfig
from lora_trainer.errors import DataError, HardwareError
from lora_trainer.evaluate.rules import ScoredReply
from lora_trainer.evaluate.sense_endpoint import JudgedReply, endpoint_scores, judged_example
from lora_trainer.evaluate.sense_examination import MOST_UNANSWERED, SENSE_VERSION, examine, proves_fitness
from lora_trainer.evaluate.sense_examples import SenseSet
from lora_trainer.evaluate.sense_metrics import JudgeName, SenseExamination, SenseMetrics
from lora_trainer.evaluate.sense_probe import SenseProbe, examine_probe
from lora_trainer.evaluate.sense_question import (
    WORDS,
    AmbiguousAnswersError,
    examine_question,
    example_questions,
    question_messages,
    question_scores,
)
from lora_trainer.evaluate.sense_rate import sense_rate
from lora_trainer.persona.prompt import PROMPT_VERSION, Message, escape_control_tokens, prompt_messages
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.store.local import replacing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PART: Final = 256
"""Examples after which an examination's progress is kept."""


class BaseReader(Protocol):
    """The part of a backend that reads replies with the base, its adapter disabled."""

    def base_reply_features(
        self, conversations: Sequence[Sequence[Message]], replies: Sequence[str], batch_size: int
    ) -> NDArray[np.float32]:
        """Return the features of each reply with its conversation, [N, F]."""

    def base_word_logits(
        self, conversations: Sequence[Sequence[Message]], words: Sequence[str], batch_size: int
    ) -> NDArray[np.float32]:
        """Return the logits with which the base would begin to answer with each of `words`, [N, W]."""


@dataclass(frozen=True, slots=True)
class Judges:
    """The judges that were examined, up to the first fit one."""

    examinations: tuple[SenseExamination, ...]
    probe: SenseProbe | None
    """The fitted probe, if it was examined."""
    unexamined: Mapping[JudgeName, str]
    """Why a judge could not be examined."""

    @property
    def chosen(self) -> SenseExamination | None:
        """The examination of the judge to use, or None if none is fit."""
        return next((found for found in self.examinations if found.fit), None)


class Judged(NamedTuple):
    """The verdict on an adapter's replies."""

    metrics: SenseMetrics
    scores: Mapping[int, float]
    """The judge's score by the reply's place among all; the others were not judged."""


class _UnexaminedError(Exception):
    """A judge could not be examined or asked; the message says why."""


@dataclass(frozen=True, slots=True)
class SenseJudge:
    """Examines the judges on `sense_set`, and judges replies with the fit one."""

    sense_set: SenseSet
    reader: BaseReader
    config: EvaluationConfig
    base_name: str
    """What reports call the base."""
    base_identity: str
    """Identifies the base's weights and the precision that they are read in."""
    folder: Path
    """Where examinations are kept."""
    _cache: Path = field(init=False)

    def __post_init__(self) -> None:
        key = json.dumps([self.base_identity, self.sense_set.sha256, PROMPT_VERSION, SENSE_VERSION])
        object.__setattr__(self, "_cache", self.folder / hashlib.sha256(key.encode()).hexdigest()[:16])

    def examine(self) -> Judges:
        """Examine one judge after the other until one is fit for use. A judge that can't be examined is left out."""
        done: list[SenseExamination] = []
        unexamined: dict[JudgeName, str] = {}
        probe: SenseProbe | None = None
        for name in self._candidates():
            try:
                if name == "probe":
                    probe, found = self._probe()
                elif name == "question":
                    found = self._question()
                elif name == "endpoint":
                    found = self._endpoint()
                else:
                    assert_never(name)
            except _UnexaminedError as error:
                unexamined[name] = str(error)
                logs.get_logger().warning("sense_judge_not_examined", judge=name, reason=str(error))
                continue
            done.append(found)
            logs.get_logger().info("sense_judge_examined", judge=name, fit=found.fit, shortfalls=list(found.shortfalls))
            if found.fit:
                break
        return Judges(tuple(done), probe, unexamined)

    def judge(self, judges: Judges, replies: Sequence[ScoredReply], blood_type: BloodType) -> Judged:
        """Judge the adapter's readable greedy replies, if a judge is fit to say whether they make sense."""
        chosen = judges.chosen
        if chosen is None:
            return Judged(_not_judged(_why_none(judges), judges), {})
        places = [at for at, reply in enumerate(replies) if _is_judged(reply) and reply.text is not None]
        if not places:
            return Judged(_not_judged("no reply is readable", judges), {})
        try:
            scores = self._scores(judges, chosen.judge, [replies[at] for at in places], blood_type)
        except _UnexaminedError as error:
            return Judged(_not_judged(f"{chosen.judge}: {error}", judges, {chosen.judge: str(error)}), {})
        known = {at: round(score, 6) for at, score in zip(places, scores, strict=True) if math.isfinite(score)}
        if (unanswered := len(places) - len(known)) > MOST_UNANSWERED * len(places):
            why = f"gave no score for {unanswered:,} of {len(places):,} replies"
            return Judged(_not_judged(f"{chosen.judge}: {why}", judges, {chosen.judge: why}), {})
        metrics = SenseMetrics(
            status="judged",
            reason="",
            judged_by=chosen.judge,
            sense=sense_rate(list(known.values()), [replies[at].prompt for at in known], chosen),
            examinations=judges.examinations,
            unexamined=judges.unexamined,
        )
        return Judged(metrics, known)

    def _candidates(self) -> Iterator[JudgeName]:
        if self.config.judge_model is not None:
            yield "endpoint"
        yield "probe"
        yield "question"

    def _scores(self, judges: Judges, name: JudgeName, replies: Sequence[ScoredReply], blood_type: BloodType) -> Sequence[float]:
        texts = [reply.text or "" for reply in replies]
        if name == "endpoint":
            judged = [
                JudgedReply(reply.summary, reply.feeling, reply.intensity, reply.input, text)
                for reply, text in zip(replies, texts, strict=True)
            ]
            answered = endpoint_scores(self.config, judged)
            if answered.failure:
                raise _UnexaminedError(answered.failure)
            return answered.scores
        if name == "question":
            asked = [question_messages(reply.summary, reply.input, text) for reply, text in zip(replies, texts, strict=True)]
            return question_scores(self._logits(asked))
        if judges.probe is None:
            raise RuntimeError("examine comes first")
        instruction = persona_spec(blood_type).instruction
        conversations = [
            prompt_messages(instruction, reply.summary, reply.feeling, reply.intensity, reply.input) for reply in replies
        ]
        features = self._read(conversations, texts)
        dialogues = [(reply.summary, reply.input) for reply in replies]
        return list(map(float, judges.probe.scores(self.sense_set, features, dialogues)))

    def _probe(self) -> tuple[SenseProbe, SenseExamination]:
        kept = self._kept("probe")
        weights = self._cache / "probe.npz"
        if kept is not None:
            try:
                return SenseProbe.load(weights), kept
            except (OSError, ValueError):
                logs.get_logger().warning("sense_cache_unreadable", file=str(weights))
        probe, found = examine_probe(self.base_name, self.sense_set, self._features())
        if self._keep(weights, probe.save) and self._keep_examination("probe", found):
            # the probe is all that later runs need, and the features of a 7B take 240 MB
            for part in self._cache.glob("features-*.npy"):
                part.unlink(missing_ok=True)
        return probe, found

    def _features(self) -> NDArray[np.float32]:
        """Return the examples' features, read by the base or kept from an attempt that was interrupted."""
        import numpy as np

        parts = []
        for start in range(0, len(self.sense_set.examples), _PART):
            examples = self.sense_set.examples[start : start + _PART]
            path = self._cache / f"features-{start:05}.npy"
            part = _array_of(path, len(examples))
            if part is None:
                part = self._read([example.messages for example in examples], [example.reply for example in examples])
                self._keep(path, partial(np.save, arr=part))
            parts.append(part)
        return np.concatenate(parts)

    def _read(self, conversations: Sequence[Sequence[Message]], replies: Sequence[str]) -> NDArray[np.float32]:
        """Return the features of each reply. Raises `_UnexaminedError` if the base can't be read."""
        import numpy as np

        with _explained():
            features = self.reader.base_reply_features(conversations, list(map(_plain, replies)), self.config.batch_size)
        if not np.isfinite(features).all():
            raise _UnexaminedError("the base's hidden states are not finite")
        return features

    def _logits(self, questions: Sequence[Sequence[Message]]) -> NDArray[np.float32]:
        """Return the logits of yes and no. Raises `_UnexaminedError` if the base can't be asked."""
        with _explained():
            return self.reader.base_word_logits(questions, WORDS, self.config.batch_size)

    def _question(self) -> SenseExamination:
        if (kept := self._kept("question")) is not None:
            return kept
        found = examine_question(self.base_name, self.sense_set, self._logits(example_questions(self.sense_set.examples)))
        self._keep_examination("question", found)
        return found

    def _endpoint(self) -> SenseExamination:
        asked = json.dumps([self.config.judge_base_url, self.config.judge_model])
        name = f"endpoint-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"
        if (kept := self._kept(name)) is not None:
            return kept
        path = self._cache / f"{name}.npy"
        examples = self.sense_set.examples
        known = _array_of(path, len(examples))
        scores = [math.nan] * len(examples) if known is None else known.tolist()
        for start in range(0, len(examples), _PART):
            missing = [at for at in range(start, min(start + _PART, len(examples))) if not math.isfinite(scores[at])]
            if not missing:
                continue
            answered = endpoint_scores(self.config, [judged_example(examples[at]) for at in missing])
            for at, score in zip(missing, answered.scores, strict=True):
                scores[at] = score
            self._keep_scores(path, scores)
            if answered.failure:
                raise _UnexaminedError(answered.failure)
        found = examine("endpoint", str(self.config.judge_model), self.sense_set, scores)
        if found.unanswered:
            # a failing server says nothing about the model
            return found
        self._keep_examination(name, found)
        path.unlink(missing_ok=True)
        return found

    def _kept(self, name: str) -> SenseExamination | None:
        """Return an examination that an earlier run kept, or None."""
        path = self._cache / f"{name}.json"
        try:
            return SenseExamination.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError):
            logs.get_logger().warning("sense_cache_unreadable", file=str(path))
            return None

    def _keep_examination(self, name: str, found: SenseExamination) -> bool:
        return self._keep(self._cache / f"{name}.json", lambda file: file.write(found.model_dump_json(indent=1).encode()))

    def _keep_scores(self, path: Path, scores: Sequence[float]) -> None:
        import numpy as np

        self._keep(path, partial(np.save, arr=np.array(scores)))

    def _keep(self, path: Path, write: Callable[[IO[bytes]], object]) -> bool:
        """Write a file that a later run may use, and return whether it was written. A full disk costs that run time, no more."""
        try:
            with replacing(path) as file:
                write(file)
        except OSError as error:
            logs.get_logger().warning("sense_cache_not_written", file=str(path), reason=error.strerror)
            return False
        return True


def judged_again(claimed: SenseMetrics, replies: Sequence[ScoredReply]) -> SenseMetrics:
    """Return `claimed` with the rate that the scores of `replies` and the recorded examination give.

    Raises `ValueError` if no recorded examination shows that its judge is fit for use.
    """
    if claimed.status == "not_judged":
        return claimed
    used = next((found for found in claimed.examinations if found.judge == claimed.judged_by), None)
    if used is None or not used.fit or not proves_fitness(used):
        raise ValueError("no recorded examination shows that the judge of sense is fit for use")
    scores = [(reply.sense, reply.prompt) for reply in replies if _is_judged(reply) and reply.sense is not None]
    if not scores:
        raise ValueError("no reply has a score of the judge of sense")
    rate = sense_rate([score for score, _ in scores], [prompt for _, prompt in scores], used)
    return claimed.model_copy(update={"sense": rate})


def _is_judged(reply: ScoredReply) -> bool:
    """Return whether the verdict is about this reply."""
    return reply.model == "adapter" and reply.decoding == "greedy"


def _why_none(judges: Judges) -> str:
    """Return why no judge can be used. The examinations have the numbers."""
    failed = [f"{found.judge} ({', '.join(line.partition(':')[0] for line in found.shortfalls)})" for found in judges.examinations]
    unexamined = [f"{name}: {why}" for name, why in judges.unexamined.items()]
    return "; ".join([*([f"no judge passed its examination: {', '.join(failed)}"] if failed else []), *unexamined])


def _not_judged(reason: str, judges: Judges, unexamined: Mapping[JudgeName, str] | None = None) -> SenseMetrics:
    return SenseMetrics(
        status="not_judged",
        reason=reason,
        judged_by=None,
        sense=None,
        examinations=judges.examinations,
        unexamined={**judges.unexamined, **(unexamined or {})},
    )


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what keeps the base from reading into `_UnexaminedError`. A lost device still ends the run."""
    try:
        yield
    except (HardwareError, DataError) as error:
        raise _UnexaminedError(error.problems[0]) from error
    except AmbiguousAnswersError:
        raise _UnexaminedError(f"{' and '.join(WORDS)} begin with the same token of this base") from None


def _array_of(path: Path, rows: int) -> NDArray[np.float32] | None:
    """Return the array of `rows` rows that an earlier attempt kept, or None."""
    import numpy as np

    try:
        with path.open("rb") as file:
            kept: NDArray[np.float32] = np.lib.format.read_array(file, allow_pickle=False)
        if len(kept) == rows:
            return kept
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError):
        pass
    logs.get_logger().warning("sense_cache_unreadable", file=str(path))
    return None


def _plain(text: str) -> str:
    """Return a reply as training writes it."""
    return escape_control_tokens(" ".join(text.split()))
