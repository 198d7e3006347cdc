"""Measure whether preference training after SFT improves an adapter: TRL's DPO with an SFT term on the pairs of data/preferences.

    python benchmarks/preference_training.py --bundle FOLDER --base FOLDER --out RESULT.json [--scratch FOLDER] [--data data/] \\
        [--betas 0.1,0.3] [--rates 5e-6,2e-5,5e-5] [--control-rates 2e-5,5e-5] [--only NAMES] [--set KEY=VALUE ...]
    python benchmarks/preference_training.py --join RESULT.json ... --out ALL.json

The bundle is a published run of one persona. `before` is its adapter. Every setting continues that adapter for one epoch over the
pairs, with the bundle's own adapter as the reference, and is saved, loaded and evaluated as `lora-trainer evaluate` would. The
controls train with the SFT term alone, which tells what comes from the preference and what from one more epoch on good replies.
Pairs whose chosen reply is held out do not train; they give the reward margin.

RESULT.json gets the numbers, RESULT.md a table, and RESULT-replies.txt 40 questions with every setting's greedy reply. All three
are written again after each setting. Differences from `before` are paired by question, with one-sided 95 % bounds. Of 50 such
differences, two or three exceed a bound by chance: confirm a setting that looks better on the adapters of other seeds.

--limit N uses the first N pairs and prompts, for a dry run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import mean
from typing import Any, Final

from lora_trainer import __version__, logs
from lora_trainer.base_model import Base, fetch_base
from lora_trainer.config import EvaluationConfig
from lora_trainer.config_sources import parse_override
from lora_trainer.data.records import EvaluationPrompt, TrainingRecord
from lora_trainer.errors import ConfigError, DivergedError, InvariantError, LoraTrainerError
from lora_trainer.evaluate.advice import NOTHING_KNOWN
from lora_trainer.evaluate.decoding import Decoding, Generation
from lora_trainer.evaluate.intervals import ClusterBootstrap
from lora_trainer.evaluate.rules import ScoredReply
from lora_trainer.persona.prompt import PROMPT_VERSION, Message, reply_json
from lora_trainer.run.adapter import base_of, check_adapter, open_adapter, settle_for, training_data_of
from lora_trainer.run.bundle_files import read_published
from lora_trainer.run.evaluation import decide, evaluate
from lora_trainer.run.inputs import fetch_prompts, read
from lora_trainer.run.job import Job, ProcessContext
from lora_trainer.run.progress import RunProgress
from lora_trainer.run.training import TokenizedData, tokenize_and_split
from lora_trainer.store.local import fresh_folder
from lora_trainer.train.backends.transformers import TransformersBackend
from lora_trainer.train.requirements import require_stack
from lora_trainer.train.tokenization import TokenSequence, record_messages, render_prompts

ROOT: Final = Path(__file__).resolve().parent.parent
BEFORE: Final = "before"
LIBRARIES: Final = ("torch", "transformers", "trl", "peft")
READ_QUESTIONS: Final = 40
RATES: Final = ("exact_json", "stop", "one_or_two_sentences", "informal_speech", "persona", "question", "emoji_intensity")
"""The gated measures with bounds of their own in `RepliesMetrics`. The win rate, sense and the two safety gates follow."""
BETTER_IF_HIGHER: Final = ("exact_json", "stop", "one_or_two_sentences", "informal_speech", "persona", "rule_score")
"""Measures whose paired differences count as better or worse. The rate of questions has a target on both sides."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to train on the pairs."""

    name: str
    losses: Mapping[str, float]
    """Weight of each of TRL's losses."""
    beta: float
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Pair:
    """One line of data/preferences, and the tokens of the record that its chosen reply comes from."""

    messages: list[Message]
    chosen: str
    rejected: str
    sequence: TokenSequence


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """Return the settings to measure: DPO with the SFT term at every beta and rate, then the controls."""
    controls = [Setting(f"sft-lr{rate:g}", {"sft": 1.0}, options.betas[0], rate) for rate in options.control_rates]
    found: list[Setting] = []
    for beta in options.betas:
        losses = {"sigmoid": 1.0, "sft": options.sft_weight}
        found += [Setting(f"dpo-b{beta:g}-lr{rate:g}", losses, beta, rate) for rate in options.rates]
        if beta == options.betas[0]:
            # early, so that a measurement that is cut short has them
            found += controls
    if options.only is None:
        return found
    if unknown := set(options.only) - {setting.name for setting in found}:
        known = ", ".join(setting.name for setting in found)
        raise ConfigError(f"--only: got {', '.join(sorted(unknown))}, expected some of {known}")
    return [setting for setting in found if setting.name in options.only]


def read_pairs(path: Path, data: TokenizedData) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs whose chosen reply is a training record, and those whose chosen reply is held out, in the file's order.

    Pairs whose chosen reply is neither are left out.
    """

    def by_text(records: Sequence[TrainingRecord], sequences: Sequence[TokenSequence]) -> dict[str, TokenSequence]:
        return {
            _key(record_messages(record), reply_json(record.reply.text, record.reply.emotion)): sequence
            for record, sequence in zip(records, sequences, strict=True)
        }

    sides = (by_text(data.train_records, data.train), by_text(data.held_out_records, data.held_out))
    found: tuple[list[Pair], list[Pair]] = ([], [])
    with path.open(encoding="utf-8") as file:
        for line in file:
            written = json.loads(line)
            chosen, rejected = written["chosen"][0]["content"], written["rejected"][0]["content"]
            for pairs, sequences in zip(found, sides, strict=True):
                if (sequence := sequences.get(_key(written["prompt"], chosen))) is not None:
                    pairs.append(Pair(written["prompt"], chosen, rejected, sequence))
    return found


def _key(messages: Sequence[Message], chosen: str) -> str:
    return json.dumps([messages, chosen])


class PreferenceBackend(TransformersBackend):
    """The reference backend, which also trains a saved adapter on pairs. Its base answers each set of questions only once."""

    _base_replies: tuple[str, list[Generation]] = ("", [])

    def generate(
        self, conversations: Sequence[Sequence[Message]], decoding: Decoding, *, adapter: bool, batch_size: int, **more: Any
    ) -> list[Generation]:
        """Generate as the reference backend does, or return the base's earlier replies to the same questions."""
        if adapter:
            return super().generate(conversations, decoding, adapter=True, batch_size=batch_size, **more)
        asked = repr((conversations, decoding, more.get("begun")))
        if self._base_replies[0] != asked:
            replies = super().generate(conversations, decoding, adapter=False, batch_size=batch_size, **more)
            self._base_replies = (asked, replies)
        return self._base_replies[1]

    def train_on_pairs(
        self,
        base: Path,
        adapter: Path,
        pairs: Sequence[Pair],
        held_out: Sequence[Pair],
        setting: Setting,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Load `adapter` and train it for one epoch over `pairs`. Return the training's facts, and the margins on `held_out`.

        Raise `InvariantError` if TRL's tokens differ from the project's, or other weights than the adapter's changed, and
        `DivergedError` for a loss that is no number.
        """
        from datasets import Dataset
        from peft import PeftModel
        from trl import DPOConfig, DPOTrainer

        from lora_trainer.train.backends.adapter_checks import check_trained_weights
        from lora_trainer.train.backends.base_loading import load_base
        from lora_trainer.train.backends.fingerprints import WeightFingerprints

        self.release()
        if not self._device.is_cuda:
            _compute_head_without_triton()
        on_cuda, recipe = self._device.is_cuda, self.config.training
        loaded = load_base(base, recipe, self.tokenizer, on_cuda=on_cuda)
        model = self._model = PeftModel.from_pretrained(loaded, str(adapter), is_trainable=True, local_files_only=True)
        before = WeightFingerprints.of(model)
        weights = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
        if not weights or any("lora_" not in name for name in weights):
            raise InvariantError(f"{len(weights)} weights would be trained, expected the adapter's and no others")
        steps = math.ceil(len(pairs) / options["pairs_per_step"])
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=str(options["work_dir"]),
                num_train_epochs=1,
                per_device_train_batch_size=options["pairs_per_pass"],
                per_device_eval_batch_size=options["pairs_per_pass"],
                gradient_accumulation_steps=options["pairs_per_step"] // options["pairs_per_pass"],
                beta=setting.beta,
                loss_type=list(setting.losses),
                loss_weights=list(setting.losses.values()),
                learning_rate=setting.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=round(0.1 * steps),
                weight_decay=0.0,
                max_grad_norm=recipe.max_grad_norm,
                optim="adamw_torch_fused" if on_cuda else "adamw_torch",
                seed=recipe.seed,
                data_seed=recipe.seed,
                bf16=recipe.compute_dtype == "bfloat16",
                use_cpu=not on_cuda,
                gradient_checkpointing=False,
                max_length=None,
                # On an H200 with torch 2.11, the gradient of a finite loss was NaN at one odd row length, whatever the setting.
                pad_to_multiple_of=64,
                dataloader_pin_memory=on_cuda,
                logging_nan_inf_filter=False,
                logging_strategy="steps",
                logging_steps=1,
                save_strategy="no",
                eval_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            # TRL copies the adapter, and takes the copy as the reference
            train_dataset=Dataset.from_list(self._as_text(pairs)),
            eval_dataset=Dataset.from_list(self._as_text(held_out)),
            processing_class=self.tokenizer,
        )
        for name, weight in weights.items():
            # TRL rounds a quantized model's adapter to bfloat16, where steps as small as these would be lost
            for each in (name, name.replace(".default.", ".ref.")):
                model.get_parameter(each).data = weight.clone()
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        if trained != set(weights):
            raise InvariantError(
                f"{len(trained ^ set(weights))} weights besides the adapter's would be trained, or not all of these"
            )
        for row, pair in zip(trainer.train_dataset, pairs, strict=True):
            if (*row["prompt_ids"], *row["chosen_ids"]) != pair.sequence.input_ids:
                raise InvariantError("TRL's tokens of a chosen reply differ from those that the adapter was trained on")
        started_s = time.perf_counter()
        with self.device_faults():
            trainer.train()
        train_s = time.perf_counter() - started_s
        steps_log = [entry for entry in trainer.state.log_history if "loss" in entry]
        if not all(math.isfinite(float(entry["loss"])) for entry in steps_log):
            raise DivergedError(f"{setting.name}: the loss is no number")
        with self.device_faults():
            measured = trainer.evaluate()
        del trainer
        model.delete_adapter("ref")
        check_trained_weights(before, WeightFingerprints.of(model), len(steps_log))
        rewards = {side: measured[f"eval_rewards/{side}"] for side in ("chosen", "rejected")}
        log_odds = measured["eval_logps/chosen"] - measured["eval_logps/rejected"]
        margin = measured["eval_rewards/margins"]
        return {
            "pairs": len(pairs),
            "steps": len(steps_log),
            "train_s": round(train_s, 1),
            "train_peak_memory_gib": round(self.peak_memory_gib(), 2),
            "train_losses": [round(float(entry["loss"]), 4) for entry in steps_log],
            "train_margins": [round(float(entry["rewards/margins"]), 4) for entry in steps_log],
            "pairs_held_out": {
                "pairs": len(held_out),
                "margin": margin,
                "accuracy": measured["eval_rewards/accuracies"],
                "rewards": rewards,
                # a reward is beta times the change of a reply's log-probability
                "log_odds": log_odds,
                "log_odds_before": log_odds - margin / setting.beta,
            },
        }

    def _as_text(self, pairs: Sequence[Pair]) -> list[dict[str, str]]:
        """Return pairs as text, rendered as for SFT. TRL would render messages with the line break after the end of turn."""
        prompts = render_prompts([pair.messages for pair in pairs], self.tokenizer)
        end = self.tokenizer.eos_token
        return [
            {"prompt": prompt, "chosen": pair.chosen + end, "rejected": pair.rejected + end}
            for prompt, pair in zip(prompts, pairs, strict=True)
        ]


def _compute_head_without_triton() -> None:
    """Replace TRL's fused head, which needs Triton, by torch's own operations, for a dry run on a CPU."""
    import torch
    from trl.trainer import utils

    class Head:
        @staticmethod
        def apply(
            hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, *_: Any
        ) -> tuple[Any, ...]:
            """Return log-probability, entropy, nothing, mean logit, and whether the label has the highest logit: [N] each."""
            logits = torch.nn.functional.linear(hidden, weight, bias).float()
            log_probs = logits.log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            chosen = log_probs.gather(-1, labels[:, None])[:, 0]
            return chosen, entropy.detach(), None, logits.mean(-1).detach(), logits.argmax(-1) == labels

    utils._ChunkedLogProbFunction = Head


@dataclass(frozen=True, slots=True)
class Measurement:
    """What every setting of a run shares."""

    job: Job
    backend: PreferenceBackend
    base: Base
    base_folder: Path
    data: TokenizedData
    prompts: Sequence[EvaluationPrompt]
    progress: RunProgress

    def of(self, adapter: Path) -> tuple[dict[str, Any], list[ScoredReply]]:
        """Load an adapter as a server would. Return its row and its greedy replies."""
        started_s = time.perf_counter()
        self.backend.load_adapter(self.base_folder, adapter)
        loss = self.backend.mean_loss(self.data.held_out)
        evaluated = evaluate(self.job, self.backend, self.base, self.prompts, self.data, self.progress)
        verdict = decide(self.job, evaluated.metrics, NOTHING_KNOWN)
        metrics, adapter_metrics = evaluated.metrics, evaluated.metrics.greedy.adapter
        sense = metrics.sense
        row = {
            "evaluate_s": round(time.perf_counter() - started_s, 1),
            "peak_memory_gib": round(self.backend.peak_memory_gib(), 2),
            "loss_held_out": loss,
            **{name: _bounded(getattr(adapter_metrics, name)) for name in RATES},
            "win_rate": _bounded(metrics.greedy.win_rate),
            "harmful": adapter_metrics.harmful,
            "incomplete": adapter_metrics.incomplete and _bounded(adapter_metrics.incomplete),
            "sense": sense
            and {"judged_by": sense.judged_by, "reason": sense.reason, "rate": sense.sense and _bounded(sense.sense)},
            # what shows that an adapter has narrowed
            **{
                name: getattr(adapter_metrics, name).value
                for name in ("rule_score", "emoji", "characters", "repetition", "verbatim_copies")
            },
            "unique_replies": adapter_metrics.unique_replies,
            "replies": metrics.replies,
            "passed": verdict.passed,
            "missed": [gate.name for gate in verdict.gates if not gate.passed],
        }
        greedy = [reply for reply in evaluated.replies if (reply.model, reply.decoding) == ("adapter", "greedy")]
        return row, greedy


def _bounded(estimate: Any) -> dict[str, float | None]:
    return {bound: getattr(estimate, bound) for bound in ("value", "lower", "upper")}


def differences(
    before: Sequence[ScoredReply], after: Sequence[ScoredReply], blood_type: str, config: EvaluationConfig
) -> dict[str, dict[str, float]]:
    """Return the mean change of each measure from `before` to `after`, which answer the same questions, with 95 % bounds."""
    bootstrap = ClusterBootstrap([reply.prompt for reply in before], config.bootstrap_resamples, config.seed)
    measures = {
        "exact_json": lambda reply: reply.exact_json,
        "stop": lambda reply: reply.stopped,
        "one_or_two_sentences": lambda reply: reply.one_or_two_sentences,
        "informal_speech": lambda reply: reply.informal_speech,
        "persona": lambda reply: reply.taken_for == blood_type,
        "question": lambda reply: reply.question,
        "rule_score": lambda reply: reply.score,
    }
    found = {}
    for name, measure in measures.items():
        changes = [
            None if measure(old) is None or measure(new) is None else float(measure(new)) - float(measure(old))
            for old, new in zip(before, after, strict=True)
        ]
        if known := [change for change in changes if change is not None]:
            lower, upper = bootstrap.mean(changes)
            found[name] = {"value": mean(known), "lower": lower, "upper": upper}
    return found


def measure(options: argparse.Namespace) -> int:
    """Measure one bundle before and after every setting, and write the result. Return 1 if a setting failed."""
    settings = settings_of(options)
    adapter = open_adapter(str(options.bundle))
    scratch: Path = options.scratch.resolve() / f"{adapter.blood_type}-{adapter.run_id}"
    config = settle_for(
        adapter,
        {
            # a relative path would name a model of the hub
            "base.model": str(options.base.resolve()),
            "data": str(options.data.resolve()),
            # shared by all bundles, for the examination of the judge of sense
            "work_dir": str(options.scratch.resolve()),
            "evaluation.temperature": 0,
            **dict(map(parse_override, options.overrides)),
        },
        {},
    )
    require_stack(config, reference=True)
    job = Job(config, ProcessContext())
    data_file = training_data_of(adapter, job)
    base = base_of(adapter, config, job.process)
    progress = job.progress(scratch, adapter.run_id)
    published = read_published(adapter.storage, "", adapter.manifest, fresh_folder(scratch / "published"))
    if published.prompt_version != PROMPT_VERSION:
        raise ConfigError(f"--bundle: got prompt version {published.prompt_version}, expected {PROMPT_VERSION}, that of the pairs")
    check_adapter(adapter, published.folder, base)
    records, prompts = read(job, data_file), fetch_prompts(job)[: options.limit]
    backend = job.start(progress, PreferenceBackend)
    if not isinstance(backend, PreferenceBackend):
        raise TypeError("another backend was started")
    base_folder = fetch_base(base, config.base)
    data = tokenize_and_split(job, records, backend.load_tokenizer(base_folder))
    train, held_out = read_pairs(options.preferences / f"preferences_type_{adapter.blood_type}.jsonl", data)
    train, held_out = train[: options.limit], held_out[: options.limit]
    if not train or not held_out:
        raise ConfigError(f"--preferences: got {len(train)} pairs of training records and {len(held_out)} of held-out ones")
    measurement = Measurement(job, backend, base, base_folder, data, prompts, progress)
    row, replies_before = measurement.of(published.folder)
    identity = {"blood_type": str(adapter.blood_type), "run_id": adapter.run_id, "seed": config.training.seed}
    rows = [{**identity, "setting": BEFORE, **row}]
    replies = {BEFORE: replies_before}
    document = {
        "what": "adapters before and after preference training (benchmarks/preference_training.py)",
        "command": " ".join(["python", *sys.argv]),
        "environment": {**job.environment, "lora_trainer": __version__, **{name: metadata.version(name) for name in LIBRARIES}},
        "base": adapter.manifest["base"],
        "training": config.training.model_dump(mode="json"),
        "pairs": {"train": len(train), "held_out": len(held_out), "per_step": options.pairs_per_step},
        "rows": rows,
    }
    write(options.out, document, replies)
    for setting in settings:
        folder = fresh_folder(scratch / setting.name)
        named = {
            **identity,
            "setting": setting.name,
            "beta": setting.beta,
            "learning_rate": setting.learning_rate,
            "losses": setting.losses,
        }
        facts = {"work_dir": folder, "pairs_per_step": options.pairs_per_step, "pairs_per_pass": options.pairs_per_pass}
        try:
            trained = backend.train_on_pairs(base_folder, published.folder, train, held_out, setting, facts)
            backend.save(folder / "adapter", base.canonical_id, base.revision)
            backend.release()
            row, after = measurement.of(folder / "adapter")
        except LoraTrainerError as error:
            rows.append({**named, "failed": error.problems})
        else:
            changes = differences(replies_before, after, adapter.blood_type, config.evaluation)
            rows.append({**named, **trained, **row, "difference": changes})
            replies[setting.name] = after
            lines = "".join(reply.model_dump_json() + "\n" for reply in after)
            (folder / "replies.jsonl").write_text(lines, encoding="utf-8")
        write(options.out, document, replies)
        print(" | ".join(cells(rows[-1])), flush=True)
    print(table(rows))
    return int(any("failed" in row for row in rows))


def write(out: Path, document: Mapping[str, Any], replies: Mapping[str, Sequence[ScoredReply]]) -> None:
    """Write the result, its table, and the replies to read."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(document["rows"]), encoding="utf-8")
    if replies:
        out.with_name(out.stem + "-replies.txt").write_text(to_read(replies), encoding="utf-8")


def to_read(replies: Mapping[str, Sequence[ScoredReply]]) -> str:
    """Return `READ_QUESTIONS` questions, the same for every run, each with the reply of every setting."""
    asked = replies[BEFORE]
    drawn = sorted(random.Random(0).sample(range(len(asked)), min(READ_QUESTIONS, len(asked))))
    parts = []
    for at in drawn:
        question = asked[at]
        tags = f" ({', '.join(question.tags)})" if question.tags else ""
        lines = [f"{question.summary} [{question.feeling} {question.intensity:g}]{tags}", f"> {question.input}"]
        lines += [f"{name:16} {found[at].reply}" for name, found in replies.items()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a table in Markdown with every row, preceded by the means over the bundles if there are several."""
    rows = list(rows)
    head = (
        "| bundle | setting | held-out loss | exact JSON | stop | two sentences | 반말 | persona | asks back | emoji–intensity | "
        "win rate | harmful | incomplete | sense | margin, accuracy | better | worse | gates missed | train, evaluate s | GiB |"
    )
    lines = []
    if len({row["run_id"] for row in rows}) > 1:
        groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            if "failed" not in row:
                groups[row["setting"]].append(row)
        names = ("loss_held_out", *RATES, "rule_score")
        lines += ["## Means over the bundles", "", f"| setting | bundles | {' | '.join(names)} | better | worse |"]
        lines.append("|---" * (len(names) + 4) + "|")
        for setting, several in groups.items():
            means = [f"{mean(_value(row[name]) for row in several):.3f}" for name in names]
            counts = [str(sum(len(changed(row)[side]) for row in several)) for side in (0, 1)]
            lines.append("| " + " | ".join([setting, str(len(several)), *means, *counts]) + " |")
        lines += ["", "## Every bundle", ""]
    lines += [head, "|---" * (head.count("|") - 1) + "|", *("| " + " | ".join(cells(row)) + " |" for row in rows)]
    return "\n".join(lines) + "\n"


def _value(measured: Any) -> float:
    return float(measured["value"] if isinstance(measured, dict) else measured)


def changed(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the measures that are better than before, and those that are worse, by the bounds of their paired difference."""
    found = {name: change for name, change in row.get("difference", {}).items() if name in BETTER_IF_HIGHER}
    better = [f"{name} {change['value']:+.3f}" for name, change in found.items() if change["lower"] > 0]
    worse = [f"{name} {change['value']:+.3f}" for name, change in found.items() if change["upper"] < 0]
    return better, worse


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row. A rate has its two bounds in brackets."""
    begin = [f"{row['blood_type']} {row['seed']}", row["setting"]]
    if "failed" in row:
        return [*begin, f"failed: {'; '.join(row['failed'])}"[:200]]

    def rate(measured: Mapping[str, float | None] | None) -> str:
        if measured is None:
            return "–"
        bounds = [f"{value:.2f}" for bound in ("lower", "upper") if (value := measured[bound]) is not None]
        return f"{measured['value']:.3f} ({', '.join(bounds)})"

    sense, pairs = row["sense"], row.get("pairs_held_out")
    return [
        *begin,
        f"{row['loss_held_out']:.4f}",
        *(rate(row[name]) for name in (*RATES, "win_rate")),
        "–" if row["harmful"] is None else str(row["harmful"]),
        rate(row["incomplete"]),
        "off" if sense is None else f"{rate(sense['rate'])} by {sense['judged_by']}" if sense["rate"] else "not judged",
        f"{pairs['margin']:.3f}, {pairs['accuracy']:.2f}" if pairs else "0",
        *("; ".join(side) or "–" for side in changed(row)),
        ", ".join(row["missed"]) or "none",
        f"{row.get('train_s', 0):.0f}, {row['evaluate_s']:.0f}",
        f"{row['peak_memory_gib']:.1f}",
    ]


def join(options: argparse.Namespace) -> int:
    """Write the rows of several results as one."""
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in options.join]
    shared = ("what", "environment", "base", "training", "pairs")
    rows = [row for part in parts for row in part["rows"]]
    document = {**{name: parts[0][name] for name in shared}, "commands": [part["command"] for part in parts], "rows": rows}
    write(options.out, document, {})
    print(table(rows))
    return 0


def numbers(text: str) -> list[float]:
    """Return the numbers in a comma-separated list; none for an empty one."""
    return [float(part) for part in text.split(",") if part]


def main() -> int:
    """Measure a bundle, or join results. Return 1 if a setting failed, or the exit code of the error that ended it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="folder of a published run")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="RESULT.json")
    parser.add_argument("--join", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--scratch", type=Path, default=ROOT / ".lora-trainer" / "preference-training")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--preferences", type=Path, default=ROOT / "data" / "preferences")
    parser.add_argument("--betas", type=numbers, default=[0.1, 0.3])
    parser.add_argument("--rates", type=numbers, default=[5e-6, 2e-5, 5e-5])
    parser.add_argument("--control-rates", type=numbers, default=[2e-5, 5e-5])
    parser.add_argument("--sft-weight", type=float, default=1.0)
    parser.add_argument("--pairs-per-step", type=int, default=16)
    parser.add_argument("--pairs-per-pass", type=int, default=16, help="pairs in memory at once")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAMES")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.pairs_per_step % options.pairs_per_pass:
        parser.error("--pairs-per-step: expected a multiple of --pairs-per-pass")
    if options.join:
        return join(options)
    if options.bundle is None or options.base is None:
        parser.error("expected --bundle and --base, or --join")
    logs.configure("info", "json")
    try:
        return measure(options)
    except LoraTrainerError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
