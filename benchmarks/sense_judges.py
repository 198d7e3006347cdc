"""Examine the judges of sense on one base, and time them: which pass, with AUCs and bounds.

    python benchmarks/sense_judges.py --base FOLDER --out RESULT.json [--features FILE.npy] [--regularisation 3,10,30,100] \\
        [--set training.quantization=none ...]

Reads every labelled reply with the base, its adapter disabled, and examines the probe at each strength of regularisation and the
base's answer to a question. For each kind of bad reply, it also measures how well the probe's regression for that kind alone tells
people's good replies from replies of that kind (`own_regressions`). With `--set evaluation.judge_model=...`, it examines a model
behind an endpoint, too. `--features` keeps what the base computed, or reads it instead of loading the base. `judge_480_s` is what
judging an adapter's 480 replies costs with the probe.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from train_speed import machine

from lora_trainer.config import RunConfig
from lora_trainer.config_sources import settle
from lora_trainer.evaluate.sense_endpoint import examine_endpoint
from lora_trainer.evaluate.sense_examination import clustered_auc
from lora_trainer.evaluate.sense_examples import BAD_KINDS, BY_HAND, SenseSet, bundled_examples
from lora_trainer.evaluate.sense_metrics import SenseExamination
from lora_trainer.evaluate.sense_probe import examine_probe
from lora_trainer.evaluate.sense_question import WORDS, examine_question, example_questions
from lora_trainer.persona.prompt import escape_control_tokens
from lora_trainer.train.backends import open_backend
from lora_trainer.train.memory_plan import plan_memory

JUDGED = 480


def read(base: Path, config: RunConfig, sense_set: SenseSet) -> tuple[np.ndarray, SenseExamination, dict[str, float]]:
    """Return the features of every example, the examination of the base's answers, and what each took in seconds."""
    backend = open_backend(config)
    backend.start()
    backend.load_tokenizer(base)
    plan = plan_memory(config.memory, config.training, backend.shape(base), backend.free_bytes(), 512, backend.name)
    backend.load(base, plan, 512)
    conversations = [example.messages for example in sense_set.examples]
    replies = [escape_control_tokens(" ".join(example.reply.split())) for example in sense_set.examples]
    batch_size = config.evaluation.batch_size
    clock = time.perf_counter()
    features = backend.base_reply_features(conversations, replies, batch_size)
    read_s = time.perf_counter() - clock
    clock = time.perf_counter()
    backend.base_reply_features(conversations[:JUDGED], replies[:JUDGED], batch_size)
    judge_s = time.perf_counter() - clock
    clock = time.perf_counter()
    logits = backend.base_word_logits(example_questions(sense_set.examples), WORDS, batch_size)
    question_s = time.perf_counter() - clock
    times = {"read_examples_s": read_s, "judge_480_s": judge_s, "ask_examples_s": question_s, "peak_gib": backend.peak_memory_gib()}
    return features, examine_question(base.name, sense_set, logits), times


def own_regressions(sense_set: SenseSet, log_odds: np.ndarray) -> dict[str, dict[str, float]]:
    """Return AUC and lower bound of each kind's regression: people's good replies against replies of the kind.

    `log_odds` are those that each example is of each kind, [N, kinds], out of fold.
    """
    kinds = np.array([example.kind for example in sense_set.examples])
    people = np.array([example.is_good and example.written_by == BY_HAND for example in sense_set.examples])
    situations = np.array([example.situation for example in sense_set.examples])
    found = {}
    for column, kind in enumerate(BAD_KINDS):
        bad = kinds == kind
        auc, lower = clustered_auc(-log_odds[people, column], -log_odds[bad, column], situations[people], situations[bad])
        found[str(kind)] = {"auc": auc, "lower": lower, "good": int(people.sum()), "bad": int(bad.sum())}
    return found


def told(found: SenseExamination) -> str:
    """Return an examination in one line."""
    parts = [f"{kind} {part.auc:.3f} ({part.lower:.3f})" for kind, part in found.separation.items()]
    adapters = [f"{kind} {part.auc:.3f} ({part.lower:.3f})" for kind, part in found.separation_of_adapters.items()]
    return (
        f"{'fit' if found.fit else 'unfit'}: {', '.join(parts)}; among adapters {', '.join(adapters)}; "
        f"sensitivity {found.sensitivity.value:.3f}, specificity {found.specificity.value:.3f}"
    )


def main() -> None:
    """Examine every judge, and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--regularisation", default="3,10,30,100")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    settings = dict(setting.split("=", 1) for setting in arguments.settings)
    config = settle({"blood_type": "A", "work_dir": str(Path(tempfile.gettempdir()) / "sense_judges"), **settings}, {})
    sense_set = bundled_examples()
    where = machine() if config.device == "cuda" else {"device": "cpu"}
    document: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), **where, "judges": {}}

    def note(name: str, found: SenseExamination) -> None:
        document["judges"][name] = found.model_dump(mode="json")
        sys.stdout.write(f"{name}: {told(found)}\n")
        sys.stdout.flush()
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    if arguments.features and arguments.features.exists():
        features = np.load(arguments.features, allow_pickle=False)
    else:
        features, question, document["times_s"] = read(arguments.base, config, sense_set)
        if arguments.features:
            np.save(arguments.features, features)
        note("question", question)
    for inverse in map(float, arguments.regularisation.split(",")):
        clock = time.perf_counter()
        probe, found = examine_probe(arguments.base.name, sense_set, features, inverse)
        document.setdefault("times_s", {})[f"fit_{inverse:g}_s"] = time.perf_counter() - clock
        own = own_regressions(sense_set, probe.kinds_out_of_fold(sense_set, features))
        document.setdefault("own_regressions", {})[f"C={inverse:g}"] = own
        note(f"probe, C={inverse:g}", found)
        parts = [f"{kind} {part['auc']:.3f} ({part['lower']:.3f})" for kind, part in own.items()]
        sys.stdout.write(f"  each kind by its own regression, against people: {', '.join(parts)}\n")
    if config.evaluation.judge_model is not None:
        note("endpoint", examine_endpoint(config.evaluation, sense_set))


if __name__ == "__main__":
    main()
