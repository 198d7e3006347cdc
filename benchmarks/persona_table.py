"""Train and measure every persona on one base: what an adapter reaches, by recipe, prompt version and seed.

    python benchmarks/persona_table.py --out benchmarks/results/personas-7b.json [--base Qwen/Qwen2.5-7B-Instruct] [--jobs 1] \\
        [--recipes FILE] [--personas A,B,O,AB] [--seeds 1,2,3] [--prompt-versions 2,3] [--set KEY=VALUE ...]

--base is a hub id or a folder. Each adapter is a whole job in a process of its own. --jobs of them run at once on one GPU, each for
at most --timeout-s. RESULT.json gets the machine, the versions, the command and the numbers, RESULT.md the same numbers as tables,
and RESULT-replies.txt 40 random greedy replies of each adapter to read. All three are written again after every adapter.

Ctrl-C and SIGTERM stop the jobs, which keep their checkpoints. The same command then continues: it takes finished adapters from
--scratch, and interrupted jobs resume. After a change of the data or the code, use another --scratch.

--recipes names a YAML file with the settings of each recipe (benchmarks/recipes.yaml); without it, the defaults are measured. Two
entries have a special meaning. `training.learning_rate: by width` computes the rate from the base's width.
`ends_at_kept_step_of: NAME` trains the recipe NAME again, with a schedule that ends at the step that NAME published. --set applies
to every job. The jobs evaluate only greedy replies.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Final, NoReturn

import yaml

from lora_trainer import __version__
from lora_trainer.config import BaseModelConfig
from lora_trainer.config_sources import parse_override, settle
from lora_trainer.errors import ConfigError, ExitCode
from lora_trainer.persona.prompt import PROMPT_VERSIONS
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.train.schedule import learning_rate_for_width

ROOT: Final = Path(__file__).resolve().parent.parent
READ_REPLIES: Final = 40
"""Replies of each adapter to keep for reading."""
GRACE_S: Final = 60.0
"""Time for a job to write its checkpoint after SIGTERM."""
KEPT_STEP_OF: Final = "ends_at_kept_step_of"
LEARNING_RATE: Final = "training.learning_rate"
BY_WIDTH: Final = "by width"
RATES: Final = ("emoji_intensity", "question", "exact_json", "one_or_two_sentences", "informal_speech", "persona")
EXAMPLE: Final = "'fast: {training.learning_rate: 5.0e-4}'"
VERDICTS: Final = (ExitCode.DONE, ExitCode.GATE)
"""Exit codes of a job that published an adapter with its verdict."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings to compare."""

    name: str
    settings: Mapping[str, Any]
    shortened: str | None = None
    """The recipe at whose kept step this one's schedule ends."""


@dataclass(frozen=True, slots=True)
class Case:
    """One adapter."""

    recipe: Recipe
    prompt_version: int
    seed: int
    persona: str

    @property
    def name(self) -> str:
        """Name in the log and of the folder."""
        return f"{self.recipe.name}-p{self.prompt_version}-s{self.seed}-{self.persona}"


def read_recipes(path: Path) -> list[Recipe]:
    """Return the recipes in a YAML file, in order. A shortened recipe adds its settings to those of the recipe that it shortens.

    Raise `ConfigError` for a file that has no valid recipes.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot read the recipes: {error}") from None
    if not isinstance(document, dict) or not document:
        raise ConfigError(f"{path}: got no recipes, expected names with settings, such as {EXAMPLE}")
    found: dict[str, Recipe] = {}
    for name, written in document.items():
        if not re.fullmatch(r"[\w.-]+", str(name)):
            raise ConfigError(f"{path}: {name}: expected a name of letters, digits, '.', '_' and '-', because it names folders")
        if not isinstance(written, dict):
            raise ConfigError(f"{path}: {name}: got {written!r}, expected settings, such as {EXAMPLE}")
        settings = dict(written)
        shortened = settings.pop(KEPT_STEP_OF, None)
        if shortened is not None:
            if shortened not in found or found[shortened].shortened:
                known = ", ".join(other.name for other in found.values() if not other.shortened)
                raise ConfigError(f"{path}: {name}: {KEPT_STEP_OF}: got {shortened}, expected a recipe above it: {known or 'none'}")
            settings = {**found[shortened].settings, **settings}
        found[str(name)] = Recipe(str(name), settings, shortened)
    return list(found.values())


def chains(recipes: Sequence[Recipe], versions: Iterable[int], seeds: Iterable[int], personas: Iterable[str]) -> list[list[Case]]:
    """Return the adapters to train, in lists. The first of each list must be trained first: the others need its kept step."""
    found = []
    for recipe, seed, version, persona in product(recipes, seeds, versions, personas):
        if recipe.shortened is None:
            followers = [other for other in recipes if other.shortened == recipe.name]
            found.append([Case(each, version, seed, persona) for each in (recipe, *followers)])
    return found


def base_width(base: BaseModelConfig) -> int:
    """Return the size of the base's hidden states, from its `config.json`."""
    path = Path(base.model) / "config.json"
    if not path.is_file():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(base.model, "config.json", revision=base.revision))
    return int(json.loads(path.read_text(encoding="utf-8"))["hidden_size"])


def with_learning_rate(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` with the learning rate as a number."""
    if settings.get(LEARNING_RATE) != BY_WIDTH:
        return dict(settings)
    config = settle({name: value for name, value in settings.items() if name != LEARNING_RATE}, {})
    rate = learning_rate_for_width(base_width(config.base), config.training.sequences_per_step)
    return {**settings, LEARNING_RATE: float(f"{rate:.3g}")}


def measured_row(metrics: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the table shows of an adapter's `metrics.json` and manifest."""
    training, held_out, greedy = metrics["training"], metrics["held_out"], metrics["evaluation"]["greedy"]
    adapter, sense = greedy["adapter"], metrics["evaluation"]["sense"]
    rates = {name: {bound: adapter[name][bound] for bound in ("value", "lower", "upper")} for name in RATES}
    incomplete = adapter["incomplete"]
    return {
        "run_id": metrics["run_id"],
        "steps": training["steps"],
        "kept_step": training["kept_step"],
        "loss_base": held_out["loss_base"],
        "loss_best": held_out["loss_adapter"],
        "loss_last": training["held_out_losses"][-1]["loss"],
        "losses": {str(measured["step"]): measured["loss"] for measured in training["held_out_losses"]},
        **rates,
        "harmful": adapter["harmful"],
        "incomplete": incomplete and {bound: incomplete[bound] for bound in ("value", "lower", "upper")},
        "sense": sense
        and {"status": sense["status"], "judged_by": sense["judged_by"], "rate": sense["sense"], "reason": sense["reason"]},
        "judges": {found["judge"]: judge_row(found) for found in (sense or {}).get("examinations", ())},
        "passed": metrics["verdict"]["passed"],
        "missed": [gate["name"] for gate in metrics["verdict"]["gates"] if not gate["passed"]],
        "tokens_per_s": training["tokens_per_s"],
        "peak_memory_gib": metrics["peak_memory_gib"],
        "timings_s": manifest["timings_s"],
    }


def judge_row(examination: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the table shows of a judge's examination."""
    return {
        "fit": not examination["shortfalls"],
        "auc": {kind: {"value": found["auc"], "lower": found["lower"]} for kind, found in examination["separation"].items()},
        "sensitivity": examination["sensitivity"]["value"],
        "specificity": examination["specificity"]["value"],
    }


def random_replies(lines: Iterable[str], name: str) -> str:
    """Return `READ_REPLIES` of the adapter's greedy replies in `replies.jsonl`, as text to read. `name` seeds the draw."""
    replies = [reply for line in lines if line.strip() and is_own(reply := json.loads(line))]
    drawn = sorted(random.Random(name).sample(range(len(replies)), min(READ_REPLIES, len(replies))))
    parts = [f"===== {name} =====\n"]
    for at in drawn:
        reply = replies[at]
        tags = f" ({', '.join(reply['tags'])})" if reply["tags"] else ""
        parts.append(
            f"{reply['summary']} [{reply['feeling']} {reply['intensity']:g}]{tags}\n> {reply['input']}\n{reply['reply']}\n"
        )
    return "\n".join(parts) + "\n"


def is_own(reply: Mapping[str, Any]) -> bool:
    """Return whether this is a greedy reply of the adapter."""
    return reply["model"] == "adapter" and reply["decoding"] == "greedy"


def run_one(asked: Path) -> NoReturn:
    """Run the job that `asked` describes in this process, as the command line does, and exit with its code."""
    import click

    from entrypoint.run_end import RunEnd
    from lora_trainer import logs
    from lora_trainer.run.job import ProcessContext
    from lora_trainer.run.pipeline import persona_runs, run
    from lora_trainer.run.reexec import StepDown, reexec, unblock_signals
    from lora_trainer.signals import Interruption
    from lora_trainer.store.retry import RetryBudget

    interruption = Interruption()
    interruption.install()
    unblock_signals()
    logs.configure("info", "json")
    document = json.loads(asked.read_text(encoding="utf-8"))
    end, code = RunEnd(interruption), int(ExitCode.DONE)
    try:
        with end:
            config = settle(document["settings"], {})
            process = ProcessContext(interruption, RetryBudget(config.storage), prompt_version=document["prompt_version"])
            end.personas = persona_runs([config], process, end.end_persona)
            with logs.libraries_print_to_the_log():
                run(end.personas, process)
        end.leave()
    except click.exceptions.Exit as ended:
        code = ended.exit_code
    except StepDown as step_down:
        reexec(step_down.limit)
    sys.stdout.flush()
    sys.stderr.flush()
    # like `entrypoint`: the libraries' exit handlers have nothing to save and sometimes hang
    os._exit(code)


@dataclass(slots=True)
class Trainer:
    """Train the cases, several at once, and keep finished rows in `scratch`."""

    scratch: Path
    settings: Mapping[str, Any]
    """Settings of every job. A recipe overrides them."""
    overrides: Mapping[str, Any]
    """Settings that override the recipe's."""
    jobs: int
    timeout_s: float
    stop: threading.Event = field(default_factory=threading.Event)

    def settings_of(self, case: Case, kept_step: int | None = None) -> dict[str, Any]:
        """Return the settings of a case, without its folders."""
        shortened = {"training.max_steps": kept_step} if case.recipe.shortened else {}
        own = {"blood_type": case.persona, "training.seed": case.seed}
        return with_learning_rate({**self.settings, **own, **case.recipe.settings, **shortened, **self.overrides})

    def train_all(self, chained: Sequence[Sequence[Case]], on_row: Callable[[Case, dict[str, Any]], None]) -> None:
        """Train every case, and call `on_row` in this thread with each result."""
        with ThreadPoolExecutor(self.jobs) as pool:
            futures: dict[Future[dict[str, Any]], tuple[Case, Sequence[Case]]] = {}
            for case, *followers in chained:
                futures[pool.submit(self.train, case)] = (case, followers)
            try:
                while futures:
                    done = next(as_completed(futures))
                    case, followers = futures.pop(done)
                    row = done.result()
                    on_row(case, row)
                    for follower in followers if "kept_step" in row else ():
                        futures[pool.submit(self.train, follower, row["kept_step"])] = (follower, ())
            except BaseException:
                # the pool waits for its threads
                self.stop.set()
                raise

    def train(self, case: Case, kept_step: int | None = None) -> dict[str, Any]:
        """Return the row of a case. Train the adapter unless an earlier attempt has finished it."""
        settings = self.settings_of(case, kept_step)
        key = json.dumps([settings, case.prompt_version, __version__], sort_keys=True)
        place = self.scratch / f"{case.name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        finished = place / "row.json"
        if finished.exists():
            return dict(json.loads(finished.read_text(encoding="utf-8")))
        if self.stop.is_set():
            return {"exit_code": int(ExitCode.INTERRUPTED), "said": "not begun"}
        place.mkdir(parents=True, exist_ok=True)
        # all jobs share the examination of the judge, which depends only on the base
        (self.scratch / "sense").mkdir(exist_ok=True)
        (place / "work").mkdir(exist_ok=True)
        if not (place / "work" / "sense").exists():
            (place / "work" / "sense").symlink_to(self.scratch / "sense", target_is_directory=True)
        folders = {"output": str(place / "out"), "work_dir": str(place / "work")}
        asked = {"settings": {**settings, **folders}, "prompt_version": case.prompt_version}
        write(place / "asked.json", json.dumps(asked, indent=1))
        code = self._attempt(place)
        attempts_s = [float(line) for line in (place / "seconds").read_text(encoding="utf-8").split()]
        row: dict[str, Any] = {"exit_code": code, "seconds": round(sum(attempts_s), 1), "attempts": len(attempts_s)}
        bundle = next((place / "out").glob("adapters/*/*/manifest.json"), None)
        if code not in VERDICTS or bundle is None:
            return {**row, "said": (place / "log").read_text(encoding="utf-8", errors="replace")[-1500:]}
        manifest = json.loads(bundle.read_text(encoding="utf-8"))
        row |= measured_row(json.loads((bundle.parent / "metrics.json").read_text(encoding="utf-8")), manifest)
        row |= {
            "recipe": case.recipe.name,
            "prompt_version": case.prompt_version,
            "seed": case.seed,
            "blood_type": case.persona,
            # paths of this machine mean nothing elsewhere
            "settings": {name: value for name, value in settings.items() if name not in ("base.model", "data")},
            "base": manifest["base"],
            "data_sha256": manifest["data"]["sha256"],
            "environment": {**manifest["environment"], "libraries": manifest["ingredients"]["libraries"]},
            "bundle": str(bundle.parent.resolve().relative_to(self.scratch)),
        }
        write(finished, json.dumps(row, indent=1))
        return row

    def _attempt(self, place: Path) -> int:
        """Run the job in a process and session of its own, which Ctrl-C does not reach. Return its exit code."""
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        clock = time.monotonic()
        with (place / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), "--run-one", str(place / "asked.json")],
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment,
            )  # fmt: skip
            while process.poll() is None and not self.stop.is_set() and time.monotonic() - clock < self.timeout_s:
                time.sleep(0.2)
            if process.poll() is None:
                process.terminate()
            try:
                code = process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        with (place / "seconds").open("a", encoding="utf-8") as file:
            file.write(f"{time.monotonic() - clock:.1f}\n")
        return code


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def number(value: float | None, digits: int = 2) -> str:
    """Return a number as a table shows it."""
    return "–" if value is None else f"{value:.{digits}f}"


def sense_cell(row: Mapping[str, Any]) -> str:
    """Return the rate of replies that make sense, and the judge, as a table shows them."""
    sense = row["sense"]
    if sense is None:
        return "off"
    return f"{sense['rate']['value']:.2f} by {sense['judged_by']}" if sense["status"] == "judged" else "not judged"


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return three tables in Markdown: the means over the seeds, every adapter, and the judges of sense."""
    head = (
        "held-out loss: base, best, last | kept step | emoji–intensity | asks back | exact JSON | two sentences | 반말 | persona | "
        "harmful | incomplete | sense | gates | s"
    )
    columns = head.count("|") + 1
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["recipe"], row["prompt_version"], row["blood_type"]].append(row)
    lines = ["## Means over the seeds", "", f"| recipe | prompt | persona | seeds | {head} |", "|---" * (columns + 4) + "|"]
    for (recipe, version, persona), several in groups.items():
        lines.append(f"| {recipe} | {version} | {persona} | {len(several)} | {' | '.join(mean_cells(several))} |")
    lines += ["", "## Every adapter", "", f"| recipe | prompt | persona | seed | {head} |", "|---" * (columns + 4) + "|"]
    for row in rows:
        cells = mean_cells([row])
        lines.append(f"| {row['recipe']} | {row['prompt_version']} | {row['blood_type']} | {row['seed']} | {' | '.join(cells)} |")
    judges = {name: found for row in rows for name, found in row["judges"].items()}
    if judges:
        head = "| judge | fit | AUC (lower bound) against good replies | sensitivity | specificity |"
        lines += ["", "## Judges of sense", "", head, "|---" * 5 + "|"]
    for name, found in judges.items():
        auc = ", ".join(f"{kind} {each['value']:.2f} ({each['lower']:.2f})" for kind, each in found["auc"].items())
        rates = f"{found['sensitivity']:.2f} | {found['specificity']:.2f}"
        lines.append(f"| {name} | {'yes' if found['fit'] else 'no'} | {auc} | {rates} |")
    return "\n".join(lines) + "\n"


def mean_cells(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cells of a table's row: the means over `rows`, and the range of the correlation if there are several."""

    def average(get: Callable[[Mapping[str, Any]], float | None], digits: int = 2) -> str:
        known = [value for row in rows if (value := get(row)) is not None]
        return number(mean(known) if known else None, digits)

    losses = ", ".join(average(lambda row, name=name: row[name], 3) for name in ("loss_base", "loss_best", "loss_last"))
    kept = "; ".join(f"{row['kept_step']} of {row['steps']}" for row in rows)
    rates = [average(lambda row, name=name: row[name]["value"], 3 if name == "exact_json" else 2) for name in RATES]
    if len(rows) > 1:
        correlations = [row["emoji_intensity"]["value"] for row in rows]
        rates[0] += f" ({min(correlations):.2f} to {max(correlations):.2f})"
    incomplete = average(lambda row: row["incomplete"] and row["incomplete"]["value"])
    passed = sum(row["passed"] for row in rows)
    gates = f"{passed} of {len(rows)} passed" if len(rows) > 1 else ("passed" if passed else ", ".join(rows[0]["missed"]))
    harmful = "; ".join("–" if row["harmful"] is None else str(row["harmful"]) for row in rows)
    sense = "; ".join(dict.fromkeys(map(sense_cell, rows)))
    return [losses, kept, *rates, harmful, incomplete, sense, gates, average(lambda row: row["seconds"], 0)]


def document_of(rows: Sequence[Mapping[str, Any]], unfinished: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result. It lists each distinct machine and base that the jobs report."""

    def distinct(name: str) -> list[Any]:
        return [json.loads(text) for text in dict.fromkeys(json.dumps(row[name], sort_keys=True) for row in rows)]

    return {
        **facts,
        "cpu_cores": os.cpu_count(),
        "environments": distinct("environment"),
        "bases": distinct("base"),
        "adapters": [{name: value for name, value in row.items() if name not in ("environment", "base", "bundle")} for row in rows],
        "unfinished": unfinished,
    }


def names(text: str) -> list[str]:
    """Return the parts of a comma-separated list, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def numbers(text: str) -> list[int]:
    """Return the numbers in a comma-separated list, each once."""
    return list(dict.fromkeys(map(int, text.split(","))))


def arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # how this program starts itself for one job
    parser.add_argument("--run-one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--base", default=BaseModelConfig().model)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--out", type=Path, metavar="RESULT.json")
    parser.add_argument("--scratch", type=Path, default=ROOT / ".lora-trainer" / "persona-table")
    parser.add_argument("--recipes", type=Path, metavar="FILE")
    parser.add_argument("--only", type=names, metavar="NAMES", help="recipes of the file to train; default: all")
    parser.add_argument("--personas", type=names, default=list(map(str, BloodType)))
    parser.add_argument("--seeds", type=numbers, default=[1, 2, 3])
    parser.add_argument("--prompt-versions", type=numbers, default=list(PROMPT_VERSIONS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout-s", type=float, default=3600.0)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    found = parser.parse_args()
    if found.run_one is None and (found.out is None or found.out.suffix != ".json"):
        parser.error("--out: expected RESULT.json")
    if found.jobs < 1:
        parser.error(f"--jobs: got {found.jobs}, expected 1 or more")
    if unknown := set(found.prompt_versions) - set(PROMPT_VERSIONS):
        parser.error(f"--prompt-versions: got {min(unknown)}, expected {' or '.join(map(str, PROMPT_VERSIONS))}")
    return found


def chosen_recipes(options: argparse.Namespace) -> list[Recipe]:
    """Return the recipes to train, in the file's order. Raise `ConfigError` for a name that the file does not have."""
    if options.recipes is None:
        return [Recipe("default", {})]
    recipes = read_recipes(options.recipes)
    if options.only is None:
        return recipes
    chosen = [recipe for recipe in recipes if recipe.name in options.only]
    have = {recipe.name for recipe in chosen}
    if unknown := set(options.only) - have:
        raise ConfigError(f"--only: got {', '.join(sorted(unknown))}, expected recipes of {options.recipes}")
    if alone := [recipe for recipe in chosen if recipe.shortened and recipe.shortened not in have]:
        raise ConfigError(f"--only: got {alone[0].name} without {alone[0].shortened}, which finds its last step; name both recipes")
    return chosen


def main() -> int:
    """Train and measure everything. Return 1 if an adapter has no result, 143 after an interruption."""
    options = arguments()
    if options.run_one is not None:
        run_one(options.run_one)
    base = Path(options.base)
    settings = {
        "base.model": str(base.resolve()) if base.is_dir() else options.base,
        "data": str(options.data.resolve()),
        "evaluation.temperature": 0,
    }
    trainer = Trainer(options.scratch.resolve(), settings, {}, options.jobs, options.timeout_s)
    try:
        trainer.overrides = dict(map(parse_override, options.overrides))
        recipes = chosen_recipes(options)
        chained = chains(recipes, options.prompt_versions, options.seeds, options.personas)
        cases = [case for chain in chained for case in chain]
        for case in cases:
            # find a wrong setting now, not after the first hour
            settle(trainer.settings_of(case, 1), {})
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return int(ExitCode.CONFIG)
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda *_: trainer.stop.set())
    trainer.scratch.mkdir(parents=True, exist_ok=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "what": "every persona, trained and evaluated by whole jobs (benchmarks/persona_table.py)",
        "command": " ".join(["python", *sys.argv]),
        "recipes": {
            recipe.name: {**recipe.settings, **({KEPT_STEP_OF: recipe.shortened} if recipe.shortened else {})} for recipe in recipes
        },
    }
    rows: dict[str, dict[str, Any]] = {}
    replies: dict[str, str] = {}
    missing: dict[str, dict[str, Any]] = {case.name: {"said": "not begun"} for case in cases}

    def on_row(case: Case, row: dict[str, Any]) -> None:
        if "kept_step" in row:
            del missing[case.name]
            rows[case.name] = row
            lines = (trainer.scratch / row["bundle"] / "replies.jsonl").read_text(encoding="utf-8").split("\n")
            replies[case.name] = random_replies(lines, case.name)
            print(f"{len(rows)} of {len(cases)}: {case.name} {row['seconds']} s | {' | '.join(mean_cells([row]))}", flush=True)
        else:
            missing[case.name] = row
            print(f"{case.name} exit {row['exit_code']} {row['said'][-300:]}", flush=True)
        finished = [case.name for case in cases if case.name in rows]
        document = document_of([rows[name] for name in finished], missing, facts)
        write(options.out, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
        write(options.out.with_suffix(".md"), tables([rows[name] for name in finished]))
        write(options.out.with_name(options.out.stem + "-replies.txt"), "\n".join(replies[name] for name in finished))

    trainer.train_all(chained, on_row)
    print(tables([rows[case.name] for case in cases if case.name in rows]))
    if trainer.stop.is_set():
        return int(ExitCode.INTERRUPTED)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
