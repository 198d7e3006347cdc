"""Let a judge that passed its examination decide whether the replies of an adapter make sense."""

from __future__ import annotations

from collections.abc import Sequence

from lora_trainer.base_model import Base
from lora_trainer.evaluate.rules import ScoredReply
from lora_trainer.evaluate.sense import SenseJudge
from lora_trainer.evaluate.sense_examples import bundled_examples
from lora_trainer.evaluate.sense_metrics import SenseMetrics
from lora_trainer.run.job import Job
from lora_trainer.run.progress import RunProgress
from lora_trainer.train.backends import Backend


def judge_sense(
    job: Job, backend: Backend, base: Base, replies: Sequence[ScoredReply], progress: RunProgress
) -> tuple[SenseMetrics | None, list[ScoredReply]]:
    """Return whether the adapter's greedy replies make sense, and all replies with the judge's scores; None if no gate asks.

    Nothing that keeps a judge from judging ends the run: the metrics say why.
    """
    config = job.config
    if config.gates.sense is None:
        return None, list(replies)
    progress.stage("judge")
    # what the base computes depends on the precision that it was loaded in
    loaded = config.evaluated_base
    identity = " ".join([base.identity, backend.name, config.device, loaded.quantization, str(loaded.compute_dtype)])
    judge = SenseJudge(bundled_examples(), backend, config.evaluation, base.canonical_id, identity, config.work_dir / "sense")
    with job.timed("examine_sense"):
        judges = judge.examine()
    with job.timed("judge_sense"):
        judged = judge.judge(judges, replies, config.blood_type)
    metrics = judged.metrics
    facts: dict[str, object] = {"judge": metrics.judged_by, "reason": metrics.reason}
    if metrics.sense is not None:
        rate = metrics.sense
        facts |= {"sense": round(rate.value, 4), "lower": round(rate.lower, 4), "accepted": rate.accepted, "of": rate.of}
    job.log.info("sense_judged", status=metrics.status, **facts)
    scored = [
        reply.model_copy(update={"sense": judged.scores[at]}) if at in judged.scores else reply for at, reply in enumerate(replies)
    ]
    return metrics, scored
