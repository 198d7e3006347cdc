"""Test broken and hostile bundles: every command that opens one ends with a reason, whatever is in its files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_metrics import MadeRun, made_run, write_made_adapter, write_made_documents, write_made_evaluation, write_safetensors
from older_bundles import with_prompt_2
from rich.console import Console
from structlog.testing import capture_logs

from entrypoint.cli import run_cli
from lora_trainer.base_model import identify_base
from lora_trainer.errors import ConfigError, LoraTrainerError
from lora_trainer.evaluate.gates import gate_id
from lora_trainer.evaluate.metrics import Verdict
from lora_trainer.evaluate.questions import evaluation_id
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.report.comparison import compare, comparison_page, comparison_table
from lora_trainer.run.adapter import open_adapter, settle_for
from lora_trainer.run.bundle_checks import check_bundle, unproven
from lora_trainer.run.bundle_files import read_published
from lora_trainer.run.identity import run_id, run_ingredients
from lora_trainer.run.job import ProcessContext
from lora_trainer.run.publication import publish_folder
from lora_trainer.store.latest import promote_latest
from lora_trainer.store.manifest import write_manifest
from lora_trainer.store.opening import open_storage

TINY_BASE = REPOSITORY / "examples" / "tiny-base"
DATA_SHA256 = "0" * 64
DOCUMENTS = ("manifest.json", "metrics.json", "adapter_config.json", "prompt.json", "train_log.jsonl", "replies.jsonl")


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("LORA_TRAINER_"):
            monkeypatch.delenv(variable)
    structlog.contextvars.clear_contextvars()


@pytest.fixture(scope="module")
def made() -> MadeRun:
    no_gates = {
        f"gates.{name}": None
        for name in ("persona", "emoji_intensity", "question_rate_min", "question_rate_max", "win_rate", "incomplete")
    }
    return made_run(
        prompts=6, sampled=False, steps=3, flaws=0.0,
        settings=(
            ("evaluation.intensities", (0.2, 0.9)), ("base.model", str(TINY_BASE)), ("device", "cpu"),
            ("training.quantization", "none"),
            ("lora.r", 8), ("lora.target_modules", ("q_proj", "v_proj")), *no_gates.items(),
            *((f"gates.{name}", 0.5) for name in ("exact_json", "stop", "one_or_two_sentences", "informal_speech")),
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(made: MadeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a bundle that proves its run id and its verdict, as a run leaves it."""
    folder = tmp_path_factory.mktemp("bundles") / "whole"
    folder.mkdir()
    base = identify_base(made.config.base)
    ingredients = run_ingredients(made.config, DATA_SHA256, base.identity)
    metrics = made.metrics.model_copy(update={"run_id": run_id(ingredients)})
    write_made_adapter(folder)
    write_made_documents(folder, made.config, metrics, base)
    write_made_evaluation(made, folder)
    (folder / "metrics.json").write_text(json.dumps(metrics.as_json()), encoding="utf-8")
    write_manifest(
        folder,
        {
            **made.facts,
            "run_id": metrics.run_id,
            "evaluation_id": metrics.evaluation.evaluation_id,
            "gate_id": metrics.verdict.gate_id,
            "verdict": metrics.verdict.model_dump(mode="json"),
            "ingredients": ingredients,
            "base": {"id": "tiny-base", "revision": None, "identity": base.identity},
            "data": {**made.facts["data"], "sha256": DATA_SHA256},
            "config": made.config.model_dump(mode="json"),
        },
    )
    assert metrics.verdict.passed
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON document in place."""
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def sign(folder: Path) -> Path:
    """Write the hashes of all files into the manifest, as somebody who changed them would."""
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.is_file() and path.name != "manifest.json"
    }
    edit(folder / "manifest.json", lambda manifest: manifest.update(files=files))
    return folder


def published(folder: Path, tmp_path: Path, **options: Any) -> tuple[dict[str, Any] | None, list[Any]]:
    """Publish to an empty output. Return its pointer and the log."""
    output = tmp_path / "out"
    with capture_logs() as log:
        publish_folder(folder, str(output), ProcessContext(), **options)
    pointer = output / "adapters" / "A" / "latest.json"
    return (json.loads(pointer.read_text()) if pointer.exists() else None), log


# -- publish ----------------------------------------------------------------------------------------------------


def test_a_bundle_that_proves_its_claims_moves_the_pointer_and_stays(copy: Path, tmp_path: Path) -> None:
    assert unproven(check_bundle(copy)) == []
    pointer, log = published(copy, tmp_path, base_model=str(TINY_BASE))
    assert pointer is not None
    assert pointer["run_id"] == json.loads((copy / "manifest.json").read_text())["run_id"]
    assert pointer["counter"] == 1
    assert "accepted_by_hand" not in pointer
    assert (copy / "adapter_model.safetensors").is_file(), "somebody's own folder"
    assert log[-1]["folder_deleted"] is False


def test_a_bundle_of_prompt_version_2_proves_itself_with_its_own_version(made: MadeRun, whole: Path, tmp_path: Path) -> None:
    folder = with_prompt_2(whole, tmp_path)
    assert "evaluation_id" in " ".join(unproven(check_bundle(folder))), "the id is of version 3's questions"
    asked = evaluation_id(made.config.evaluation, made.metrics.evaluation.prompts_sha256, 2)
    gates = {"gate_id": gate_id(asked, made.config.gates)}

    def identify(document: Any) -> None:
        document["verdict"].update(gates)
        document.update(gates) if "gate_id" in document else document["evaluation"].update(evaluation_id=asked)

    edit(folder / "metrics.json", identify)
    edit(folder / "manifest.json", identify)
    assert unproven(check_bundle(sign(folder))) == []
    edit(folder / "manifest.json", lambda manifest: manifest["ingredients"].update(prompt_version=3))
    edit(folder / "manifest.json", lambda manifest: manifest.update(run_id=run_id(manifest["ingredients"])))
    edit(
        folder / "metrics.json", lambda metrics: metrics.update(run_id=json.loads((folder / "manifest.json").read_text())["run_id"])
    )
    assert unproven(check_bundle(sign(folder))) == ["the run id is a hash of other values than the manifest has: prompt_version"]


def test_only_the_runs_own_folder_is_deleted(copy: Path, tmp_path: Path) -> None:
    """A folder that merely has the same shape of path is somebody's own."""
    manifest = json.loads((copy / "manifest.json").read_text())
    shaped = tmp_path / "downloads" / "runs" / "A" / manifest["run_id"] / "bundle"
    shutil.copytree(copy, shaped)
    with pytest.raises(ConfigError, match="expected --output"):
        publish_folder(shaped, None, ProcessContext())
    published(shaped, tmp_path)
    assert shaped.exists()
    edit(shaped / "manifest.json", lambda document: document["config"].update(work_dir=str(tmp_path / "downloads")))
    shutil.rmtree(tmp_path / "out")
    published(shaped, tmp_path)
    assert not shaped.exists()


def weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write other weights of the made adapter's names."""
    rng = np.random.default_rng(1)
    tensors: dict[str, Any] = {}
    for layer in range(4):
        for module, out_size in (("q_proj", 192), ("v_proj", 64)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = rng.normal(size=(8, 192)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = rng.normal(size=(out_size, 8)).astype(np.float32)
    change(tensors)
    write_safetensors(folder / "adapter_model.safetensors", tensors)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def adapter_settings(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "adapter_config.json", lambda document: document.update(changes))


def manifest_facts(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "manifest.json", lambda document: document.update(changes))


class Trap:
    def __reduce__(self) -> Any:
        # as text: coverage replaces os._exit by a function that cannot be pickled
        return exec, ("import os; os._exit(99)",)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config-list": (manifest_facts(config=["x"]), "manifest.json: config: got a list; expected an object"),
    "base-text": (manifest_facts(base="x", data="y"), "manifest.json: base: got 'x'; expected an object"),
    "run-id-path": (manifest_facts(run_id="../../x"), "manifest.json: run_id: got '../../x'"),
    "rank-huge": (adapter_settings(r=10**9), "adapter_config.json: r: got 1000000000; expected less than or equal to 512"),
    "rank-float": (adapter_settings(r=8.5), "adapter_config.json: r: got 8.5; expected an integer"),
    "alpha-text": (adapter_settings(lora_alpha="1"), "adapter_config.json: lora_alpha: got '1'"),
    "regex": (adapter_settings(target_modules="(a+)+$"), "a text is a regular expression"),
    "regex-in-a-pattern": (adapter_settings(rank_pattern={"(a+)+$": 8}), "rank_pattern: got an object; expected nothing"),
    "modules-to-save": (adapter_settings(modules_to_save=["lm_head"]), "modules_to_save: got a list; expected nothing"),
    "other-init": (adapter_settings(init_lora_weights="pissa"), "init_lora_weights: got 'pissa'"),
    "mapping": (adapter_settings(auto_mapping={"parent_library": "os"}), "auto_mapping.parent_library: got 'os'"),
    "unknown-key": (adapter_settings(runtime_hook="evil.run"), "'runtime_hook': not a field of this project's adapters"),
    "damaged-weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 100), "damaged or cut off"),
    "pickled-weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(pickle.dumps(Trap())),
        "adapter_model.safetensors: got",
    ),
    "other-rank": (adapter_settings(r=4), "expected [4, …] and […, 4] by r in adapter_config.json"),
    "other-modules": (adapter_settings(target_modules=["k_proj"]), "got weights of q_proj, v_proj, expected those of"),
    "foreign-tensor": (lambda f: weights(f, lambda t: t.update({"lm_head.weight": t[Q0]})), "got the tensor 'lm_head.weight'"),
    "missing-tensor": (lambda f: weights(f, lambda t: t.pop(Q0)), "layer 0: q_proj: got no lora_A"),
    "nan": (lambda f: weights(f, lambda t: t[Q0].__setitem__((0, 0), np.nan)), "got NaN or infinity"),
    "infinity": (lambda f: weights(f, lambda t: t[Q0].__setitem__((7, 191), -np.inf)), "got NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_ends_every_command_with_its_reason(
    copy: Path, whole: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it, said = BROKEN[name]
    identity = json.loads((copy / "manifest.json").read_text())["run_id"]
    break_it(copy)
    sign(copy)
    placed = tmp_path / "in place" / "adapters" / "A" / identity
    shutil.copytree(copy, placed)
    commands = {
        "publish": ["publish", str(copy), "--output", str(tmp_path / "out")],
        "promote": ["promote", str(placed)],
        "compare": ["compare", str(copy), str(whole)],
        "review": ["review", str(copy), "--output", str(tmp_path / "review.html")],
    }
    if name in ("nan", "infinity"):
        # these read no weights
        del commands["compare"], commands["review"]
    for command in commands.values():
        assert run_cli(command) == 2, command
        error = capsys.readouterr().err
        assert said in error, command
        assert "bug" not in error
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "review.html").exists()
    assert not (placed.parent / "latest.json").exists()


def add(name: str, data: bytes = b"x") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def link(folder: Path) -> None:
    (folder / "persona.yaml").unlink()
    (folder / "persona.yaml").symlink_to("/etc/passwd")


def auto_map(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda document: document.update(auto_map={"AutoTokenizer": ["evil.Tok", None]}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add("adapter_model.bin", pickle.dumps(Trap())), "adapter_model.bin: got weights that are pickled"),
        (add("optimizer.PT"), "optimizer.PT: got weights that are pickled"),
        (add("evil.py"), "evil.py: got a file that no run writes into a bundle"),
        (add("\u202egpj.txt"), "\\u202egpj.txt: got a file that no run writes"),
        (link, "persona.yaml: got a link"),
        (lambda f: (f / "extra").mkdir(), "extra: got a folder"),
        (lambda f: os.mkfifo(f / "README"), "README: got no regular file"),
        (lambda f: (f / "prompt.json").unlink(), "prompt.json: not found, and every bundle has it"),
        (lambda f: (f / "prompt.json").write_text("[1]"), "prompt.json: got a list, expected a JSON object"),
        (lambda f: (f / "prompt.json").write_text('{"version": "3"}'), "prompt.json: version: got '3'; expected an integer"),
        (lambda f: edit(f / "prompt.json", lambda d: d.update(version=1)), "prompt.json: version: got 1, expected 2 or 3"),
        (lambda f: (f / "train_log.jsonl").write_text('{"step": 1}\n'), "train_log.jsonl:1: loss: got nothing; field required"),
        (lambda f: (f / "replies.jsonl").write_text('{"reply": NaN}\n'), "replies.jsonl:1: not JSON (NaN is no JSON number)"),
        (auto_map, "tokenizer_config.json: auto_map: got the name of code"),
        (lambda f: edit(f / "metrics.json", lambda d: d.update(run_id="f" * 16)), "run_id: got"),
        (lambda f: edit(f / "metrics.json", lambda d: d["verdict"].update(passed=False)), "verdict.passed: got True"),
        (lambda f: edit(f / "manifest.json", lambda d: d["config"]["lora"].update(r=16)), "config.lora: differs from r"),
    ],
)  # fmt: skip
def test_what_publish_refuses(copy: Path, tmp_path: Path, change: Callable[[Path], object], said: str) -> None:
    change(copy)
    with pytest.raises(ConfigError) as refused:
        published(sign(copy), tmp_path)
    assert said in str(refused.value)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    assert copy.exists()


def test_a_file_that_the_manifest_does_not_know_or_knows_otherwise_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "README.md").write_text("another")
    (copy / "vocab.json").write_text("{}")
    with pytest.raises(ConfigError) as refused:
        published(copy, tmp_path)
    assert [problem.partition(": ")[2].partition(";")[0] for problem in refused.value.problems] == [
        "differs from the bundle's manifest", "not listed in manifest.json",
    ]  # fmt: skip


def test_another_base_is_refused(copy: Path, tmp_path: Path) -> None:
    other = shutil.copytree(TINY_BASE, tmp_path / "other-base")
    (other / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="the adapter was trained on sha256:"):
        published(copy, tmp_path, base_model=str(other))


def other_reply(folder: Path, **changes: Any) -> None:
    path = folder / "replies.jsonl"
    first, *rest = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text(json.dumps({**json.loads(first), **changes}) + "\n" + "".join(rest), encoding="utf-8")


def looser(folder: Path) -> None:
    """Claim that the adapter passed thresholds that it missed."""
    edit(folder / "manifest.json", lambda document: document["config"]["gates"].update(exact_json=0.99))


def fewer_replies(folder: Path) -> None:
    path = folder / "replies.jsonl"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[2:]), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (manifest_facts(ingredients={}), "the run id is not the hash of the manifest's ingredients"),
        (
            lambda f: edit(f / "manifest.json", lambda d: d["data"].update(sha256="1" * 64)),
            "a hash of other values than the manifest has: data_sha256",
        ),
        (lambda f: other_reply(f, informal_speech=False), "the rules find something else in the adapter's greedy reply 1"),
        (lambda f: other_reply(f, reply="안녕하십니까"), "the rules find something else in the adapter's greedy reply 1"),
        (lambda f: other_reply(f, stopped=False, score=0.0), "the rules find something else"),
        (lambda f: other_reply(f, input="쉬운 질문"), "adapter and base were asked different questions"),
        (lambda f: other_reply(f, tags=["crisis"]), "adapter and base were asked different questions"),
        (fewer_replies, "expected one of each model to each question"),
        (
            lambda f: edit(
                f / "metrics.json", lambda d: d["evaluation"]["greedy"]["adapter"]["persona"].update(value=1, lower=0.99)
            ),
            "metrics.json has other numbers than replies.jsonl gives",
        ),
        (looser, "the manifest's thresholds give another verdict"),
        (
            lambda f: edit(f / "manifest.json", lambda d: d["config"]["evaluation"].update(max_new_tokens=9)),
            "another version measured the replies, or with other settings",
        ),
    ],
)
def test_a_claim_that_cannot_be_proved_needs_the_users_word(
    copy: Path, tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    change(copy)
    pointer, log = published(sign(copy), tmp_path)
    assert pointer is None
    (warning,) = (line for line in log if line["event"] == "latest_not_moved")
    assert said in str(warning["problems"])
    assert "--accept" in warning["advice"]
    pointer, log = published(copy, tmp_path, accepted=True)
    assert pointer is not None
    assert pointer["accepted_by_hand"] is True
    assert pointer["counter"] > 0
    assert "promoted_at" in pointer
    assert any(line["event"] == "latest_checked" and "accepted by hand" in line["reason"] for line in log)


def test_a_missed_gate_is_not_accepted_by_hand(copy: Path, tmp_path: Path) -> None:
    verdict = Verdict.model_validate(json.loads((copy / "metrics.json").read_text())["verdict"])
    missed = [gate.model_copy(update={"passed": False}) for gate in verdict.gates]
    failed = verdict.model_copy(update={"passed": False, "gates": tuple(missed)}).model_dump(mode="json")
    edit(copy / "metrics.json", lambda document: document.update(verdict=failed))
    edit(copy / "manifest.json", lambda document: document.update(verdict=failed))
    pointer, log = published(sign(copy), tmp_path, accepted=True)
    assert pointer is None
    assert any(line.get("reason") == "the gates were not passed" for line in log)


def test_a_bundle_does_not_replace_another_of_the_same_run(copy: Path, tmp_path: Path) -> None:
    published(copy, tmp_path)
    (copy / "README.md").write_text("another")
    with pytest.raises(ConfigError, match="got another bundle than the one that is published at"):
        published(sign(copy), tmp_path)


def test_a_copied_bundle_does_not_take_a_later_runs_place(copy: Path, tmp_path: Path) -> None:
    """The counter in its manifest is of another output, or anybody's claim."""
    output = open_storage(str(tmp_path / "out"))
    promote_latest(output, BloodType.A, {"run_id": "mine", "started_at": "2020-01-01T00:00:00+00:00"})
    edit(copy / "manifest.json", lambda document: document.update(counter=10**12))
    pointer, log = published(copy, tmp_path)
    assert pointer is not None
    assert pointer["run_id"] == "mine"
    assert any("this run has none in this output" in line.get("reason", "") for line in log)


# -- any other content ------------------------------------------------------------------------------------------


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**400), 10**400),
    st.sampled_from(
        [10**18, -1, 0, 1e308, -1e308, 5e-324, "", "\x1b[2J\u202e", "../..", "\ud800", "a" * 10_000, "2026-13-45", "NaN"]
    ),
    st.lists(st.none(), max_size=2),
    st.dictionaries(st.sampled_from(["", "schema", "\x00", "r"]), st.integers(), max_size=2),
)


def mutate(document: Any, rng: random.Random, value: Any) -> Any:
    """Change one place of a JSON document: drop it, replace it, nest it, or rename its key."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(document)
    if not places or rng.random() < 0.05:
        return value
    node, key = rng.choice(places)
    match rng.randrange(5):
        case 0:
            del node[key]
        case 1:
            for _ in range(rng.choice([1, 40])):
                node[key] = [node[key]]
        case 2 if isinstance(node, dict):
            node[f"{key}\x9b"] = node.pop(key)
        case _:
            node[key] = deepcopy(value)
    return document


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(DOCUMENTS), seed=st.integers(0, 2**32), times=st.integers(1, 3), value=VALUES)
def test_no_content_ends_in_another_error_than_our_own(
    whole: Path, tmp_path: Path, name: str, seed: int, times: int, value: Any
) -> None:
    folder = tmp_path / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in whole.iterdir():
        os.link(path, folder / path.name)
    rng = random.Random(seed)
    text = (folder / name).read_text(encoding="utf-8")
    (folder / name).unlink()
    first, *rest = text.splitlines() if name.endswith(".jsonl") else [text]
    document = json.loads(first)
    for _ in range(times):
        document = mutate(document, rng, value)
    changed = "\n".join([json.dumps(document), *rest])
    (folder / name).write_text(changed, encoding="utf-8")
    if name != "manifest.json":
        (folder / "manifest.json").unlink()
        shutil.copyfile(whole / "manifest.json", folder / "manifest.json")
        sign(folder)
    shown = Console(width=200, file=io.StringIO())

    def compared() -> None:
        found = compare([str(folder), str(whole)])
        shown.print(comparison_table(found))
        comparison_page(found)
        json.dumps(found.as_json())

    def opened() -> None:
        adapter = open_adapter(str(folder))
        settle_for(adapter, {}, {})
        scratch = tmp_path / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        read_published(adapter.storage, "", adapter.manifest, scratch)

    def checked() -> None:
        unproven(check_bundle(folder))

    for work in (compared, opened, checked):
        try:
            work()
        except LoraTrainerError as error:
            said = str(error)
            if not said or "\x1b" in said:
                pytest.fail(f"{work.__name__}: {said!r}")
