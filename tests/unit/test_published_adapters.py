"""Test `evaluate` and `promote` up to the point where they need a model: bundle, settings, base and data."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import structlog
from conftest import REPOSITORY
from made_metrics import MadeRun, made_run, write_made_adapter, write_made_evaluation
from structlog.testing import capture_logs

from entrypoint.cli import run_cli
from lora_trainer.base_model import identify_base
from lora_trainer.config import RunConfig, setting_names
from lora_trainer.config_sources import settle
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.persona.prompt import prompt_template
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.run.adapter import Adapter, base_of, open_adapter, output_of, settle_for
from lora_trainer.run.job import ProcessContext
from lora_trainer.run.reevaluation import evaluate_adapter
from lora_trainer.store.bundle import publish_bundle
from lora_trainer.store.interface import NotFound, Storage
from lora_trainer.store.latest import link_newest, move_latest, take_count
from lora_trainer.store.local import fresh_folder, sha256_of
from lora_trainer.store.manifest import DamagedError, verify_files, write_json, write_manifest
from lora_trainer.store.opening import open_storage
from lora_trainer.store.prefixes import bundle_prefix, evaluation_prefix

TINY_BASE = REPOSITORY / "examples" / "tiny-base"
DATA = REPOSITORY / "data" / "train_data_type_A.jsonl"
RUN_ID = "0123456789abcdef"
STARTED_AT = "2026-01-01T00:00:00+00:00"
# the settings of the run that trained the adapter
TOLD: dict[str, Any] = {
    "blood_type": "A",
    "data": str(DATA.parent),
    "output": "/elsewhere/out",
    "work_dir": "/elsewhere/work",
    "strict": True,
    "device": "cpu",
    "base.model": str(TINY_BASE),
    "training.quantization": "none",
    "training.held_out_fraction": 0.1,
    "lora.r": 8,
    "lora.target_modules": ["q_proj", "v_proj"],
    "evaluation.intensities": [0.2, 0.8],
    "gates.persona": None,
    "gates.exact_json": 0.5,
    "memory.micro_batch_tokens": 512,
    "logging.level": "debug",
    "logging.report_to": ["tensorboard"],
}


# one value for each setting that is a location
PLACES: dict[str, Any] = {"data": "s3://bucket/d/", "evaluation.prompts": "s3://bucket/p.jsonl", "base.model": "s3://bucket/m/"}


def leaf(config: RunConfig, name: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for part in name.split("."):
        value = value[part]
    return value


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, aws_environment: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("LORA_TRAINER_"):
            monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made() -> MadeRun:
    return made_run(prompts=6, sampled=False, steps=3)


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return open_storage(f"file://{tmp_path}/out put 100%25 출력/")


def publish(output: Storage, made: MadeRun, scratch: Path, run_id: str = RUN_ID, started_at: str = STARTED_AT, **facts: Any) -> str:
    """Publish a bundle as a run does, and return its URI."""
    folder = fresh_folder(scratch / "bundle")
    write_made_adapter(folder)
    write_made_evaluation(made, folder)
    write_json(folder / "prompt.json", prompt_template("너는 A형 친구야."))
    config = settle(TOLD, {})
    whole = {
        **made.facts,
        "run_id": run_id,
        "blood_type": "A",
        "started_at": started_at,
        "finished_at": started_at,
        "gate_id": made.metrics.verdict.gate_id,
        "verdict": made.metrics.verdict.model_dump(mode="json"),
        "base": {"id": "tiny-base", "revision": None, "identity": identify_base(config.base).identity},
        "data": {**made.facts["data"], "uri": DATA.as_uri(), "sha256": sha256_of(DATA)},
        "config": config.model_dump(mode="json"),
        **facts,
    }
    write_manifest(folder, whole)
    prefix = bundle_prefix(BloodType.A, run_id)
    publish_bundle(folder, output, prefix)
    return f"{output.uri}{prefix}"


@pytest.fixture
def adapter(output: Storage, made: MadeRun, tmp_path: Path) -> Adapter:
    return open_adapter(publish(output, made, tmp_path))


def local(adapter: Adapter) -> Path:
    assert adapter.storage.local_folder is not None
    return adapter.storage.local_folder


# -- finding the bundle ---------------------------------------------------------------------------------------


def test_a_bundle_is_opened_by_uri_by_folder_and_by_link(adapter: Adapter, output: Storage) -> None:
    link = link_newest(output, BloodType.A, RUN_ID)
    folder = local(adapter)
    for uri in (adapter.storage.uri, adapter.storage.uri.rstrip("/"), str(folder), f"{folder}/", str(link)):
        opened = open_adapter(uri)
        assert (opened.run_id, opened.manifest) == (RUN_ID, adapter.manifest)
        assert output_of(opened).uri == output.uri


@pytest.mark.parametrize("name", ["nowhere", "adapters/A", f"adapters/A/{RUN_ID}/evaluations", "adapters/B/0"])
def test_what_is_no_bundle(adapter: Adapter, output: Storage, name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"no manifest\.json of a run there; expected a bundle, such as <output>/adapters/A/<run id>/"
    ):
        open_adapter(output.uri + name)


def test_a_half_published_bundle_is_none(adapter: Adapter) -> None:
    (local(adapter) / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="a bundle whose manifest is not there yet is not published"):
        open_adapter(adapter.storage.uri)


def test_a_manifest_of_something_else(adapter: Adapter) -> None:
    """Other programs and versions also write a manifest.json, for example for web pages."""
    path = local(adapter) / "manifest.json"
    path.write_text('{"schema": 1, "files": {}}')
    with pytest.raises(ConfigError, match=r"no manifest\.json of a run there"):
        open_adapter(adapter.storage.uri)
    path.write_text('{"name": "My app", "icons": []}')
    with pytest.raises(ConfigError, match="not a manifest of schema 1"):
        open_adapter(adapter.storage.uri)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://", "names no bucket|bucket"),
        ("ftp://x/y", "unknown scheme 'ftp://'"),
        ("file.txt", "got a file, expected a folder"),
    ],
)
def test_what_is_no_folder(tmp_path: Path, uri: str, said: str) -> None:
    (tmp_path / "file.txt").touch()
    with pytest.raises(ConfigError, match=said):
        open_adapter(uri)


def test_the_output_of_a_copy_elsewhere_is_unknown(adapter: Adapter, tmp_path: Path) -> None:
    shutil.copytree(local(adapter), tmp_path / "copy")
    copy = open_adapter(str(tmp_path / "copy"))
    with pytest.raises(ConfigError, match=f"expected a bundle in its place, <output>/adapters/A/{RUN_ID}/: a copy elsewhere"):
        output_of(copy)
    # a folder with the run's own id, but of another persona
    shutil.copytree(local(adapter), tmp_path / "adapters" / "AB" / RUN_ID)
    with pytest.raises(ConfigError, match="expected a bundle in its place"):
        output_of(open_adapter(str(tmp_path / "adapters" / "AB" / RUN_ID)))


def test_the_output_of_a_bundle_in_s3() -> None:
    storage = open_storage(f"s3://bucket/lora/adapters/A/{RUN_ID}/")
    assert output_of(Adapter(storage, {"run_id": RUN_ID, "blood_type": "A"})).uri == "s3://bucket/lora/"
    storage = open_storage(f"s3://bucket/adapters/A/{RUN_ID}/")
    assert output_of(Adapter(storage, {"run_id": RUN_ID, "blood_type": "A"})).uri == "s3://bucket/"


# -- settings -------------------------------------------------------------------------------------


def test_the_runs_settings_and_not_those_of_its_machine(adapter: Adapter) -> None:
    config = settle_for(adapter, {}, {})
    trained, default = settle(TOLD, {}), settle({"blood_type": "A"}, {})
    for section in ("lora", "training", "evaluation", "gates", "blood_type", "backend", "device"):
        assert getattr(config, section) == getattr(trained, section), section
    for section in ("work_dir", "output", "data", "base", "strict", "memory", "logging"):
        assert getattr(config, section) == getattr(default, section) != getattr(trained, section), section


def test_no_place_is_taken_from_a_manifest(adapter: Adapter) -> None:
    """Otherwise the adapter's author could choose what this machine reads, and who receives its keys."""
    foreign = json.loads(json.dumps(adapter.manifest))

    def mark(section: dict[str, Any]) -> None:
        for name, value in section.items():
            if isinstance(value, dict):
                mark(value)
            elif isinstance(value, str) or value is None:
                section[name] = f"https://foreign/{name}"

    kept = {section: adapter.manifest["config"][section] for section in ("backend", "device", "lora", "training", "gates")}
    mark(foreign["config"])
    foreign["config"] |= kept
    # one of a few words each, so no place
    foreign["config"]["evaluation"] |= {name: adapter.manifest["config"]["evaluation"][name] for name in ("depth", "precision")}
    foreign["data"]["uri"] = "s3://foreign/data.jsonl"
    assert foreign["config"]["evaluation"]["judge_base_url"].startswith("https://foreign/")
    config = settle_for(Adapter(adapter.storage, foreign), {}, {})
    assert "foreign" not in config.model_dump_json()
    # if you add a setting with a path or a URI, add it here
    texts = {
        name
        for name in setting_names()
        if any(type(value) is str and ("/" in value or ":" in value) for value in [leaf(settle(TOLD | PLACES, {}), name)])
    }
    assert texts == {
        "data",
        "output",
        "work_dir",
        "base.model",
        "base.cache_dir",
        "evaluation.prompts",
        "evaluation.judge_base_url",
    }


def test_everything_may_be_told_otherwise(adapter: Adapter, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("gates:\n  exact_json: 0.6\n  stop: 0.6\ndevice: cuda\n")
    environment = {"LORA_TRAINER_GATES__STOP": "0.7", "LORA_TRAINER_GATES__PERSONA": "0.8", "LORA_TRAINER_WORK_DIR": "w"}
    config = settle_for(adapter, {"gates.persona": "0.9", "data": "other/"}, environment, file)
    assert (config.gates.exact_json, config.gates.stop, config.gates.persona) == (0.6, 0.7, 0.9)
    assert (config.device, config.data, config.work_dir) == ("cuda", "other/", Path("w"))
    # settings that neither options nor variables mention come from the run
    assert (config.lora.r, config.evaluation.intensities) == (8, (0.2, 0.8))
    assert settle_for(adapter, {"gates.exact_json": None}, {}).gates.exact_json is None


def test_settings_for_several_personas_are_the_adapters_as_well(adapter: Adapter) -> None:
    assert settle_for(adapter, {}, {"LORA_TRAINER_BLOOD_TYPE": "all"}) == settle_for(adapter, {}, {})
    with pytest.raises(ConfigError, match="blood_type: got B, O, the adapter is A's: leave it out"):
        settle_for(adapter, {"blood_type": "B,O"}, {})


def test_settings_of_a_newer_version_are_left_out(adapter: Adapter) -> None:
    manifest = json.loads(json.dumps(adapter.manifest))
    manifest["config"]["training"]["sharpness"] = 0.5
    manifest["config"]["teacher"] = {"model": "x", "nested": {"deep": [1]}}
    manifest["config"]["mood"] = "good"
    newer = Adapter(adapter.storage, manifest)
    assert settle_for(newer, {}, {}) == settle_for(adapter, {}, {})


def test_a_value_that_only_a_newer_version_knows_is_said(adapter: Adapter) -> None:
    manifest = json.loads(json.dumps(adapter.manifest))
    manifest["config"]["training"]["schedule"] = "spiral"
    with pytest.raises(ConfigError, match=r"training\.schedule: got 'spiral'; input should be 'cosine', 'linear' or 'constant'"):
        settle_for(Adapter(adapter.storage, manifest), {}, {})
    assert settle_for(Adapter(adapter.storage, manifest), {"training.schedule": "linear"}, {}).training.schedule == "linear"


def test_a_manifest_from_before_there_was_a_configuration(adapter: Adapter) -> None:
    manifest = {name: value for name, value in adapter.manifest.items() if name != "config"}
    config = settle_for(Adapter(adapter.storage, manifest), {}, {})
    assert (config.blood_type, config.data) == ("A", "data/")


@pytest.mark.parametrize(
    ("cli", "environment"),
    [({"blood_type": "B"}, {}), ({}, {"LORA_TRAINER_BLOOD_TYPE": "B"}), ({}, {"LORA_TRAINER_BLOOD_TYPE": "AB"})],
)
def test_an_adapter_is_not_judged_as_another_persona(adapter: Adapter, cli: dict[str, Any], environment: dict[str, str]) -> None:
    """A job sets the variable in every pod, and with it the data folder would be another persona's, too."""
    with pytest.raises(ConfigError, match=r"blood_type: got A?B, the adapter is A's: leave it out"):
        settle_for(adapter, cli, environment)
    assert settle_for(adapter, {}, {"LORA_TRAINER_BLOOD_TYPE": "a"}).blood_type == "A"


# -- base and data -----------------------------------------------------------------------------


def settled(adapter: Adapter, tmp_path: Path, **changes: Any) -> RunConfig:
    named = {"work_dir": str(tmp_path / "work"), "data": str(DATA.parent), "base.model": str(TINY_BASE)}
    return settle_for(adapter, {**named, **changes}, {})


def test_the_base_that_it_was_trained_on(adapter: Adapter, tmp_path: Path) -> None:
    assert base_of(adapter, settled(adapter, tmp_path), ProcessContext()).folder == TINY_BASE
    # a copy of the same files elsewhere works as well
    shutil.copytree(TINY_BASE, tmp_path / "mirror")
    mirrored = settled(adapter, tmp_path, **{"base.model": str(tmp_path / "mirror")})
    assert base_of(adapter, mirrored, ProcessContext()).folder == tmp_path / "mirror"


def test_another_base_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    shutil.copytree(TINY_BASE, tmp_path / "other")
    with (tmp_path / "other" / "config.json").open("a") as file:
        file.write("\n")
    config = settled(adapter, tmp_path, **{"base.model": str(tmp_path / "other")})
    expected = adapter.manifest["base"]["identity"]
    got = identify_base(config.base).identity
    with pytest.raises(ConfigError) as refused:
        evaluate_adapter(adapter, config, None, ProcessContext())
    (problem,) = refused.value.problems
    assert problem == (
        f"base.model: {tmp_path}/other: got the base {got}, the adapter was trained on {expected}: pass that one with --base-model "
        f"(its run had base.model={TINY_BASE}; what a manifest names is not opened unasked)"
    )
    assert not (tmp_path / "work" / "evaluations").exists(), "nothing was fetched for it"


def test_other_data_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    other = tmp_path / "train_data_type_A.jsonl"
    other.write_bytes(DATA.read_bytes() + DATA.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(DataError) as refused:
        evaluate_adapter(adapter, settled(adapter, tmp_path, data=str(tmp_path)), None, ProcessContext())
    (problem,) = refused.value.problems
    assert problem.startswith(f"file://{other}: got SHA-256 {sha256_of(other)}, the adapter was trained on {sha256_of(DATA)}: ")
    assert f"pass it with --data (its run had {DATA.as_uri()}; " in problem


def test_data_that_is_not_where_it_is_looked_for(adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(NotFound) as refused:
        evaluate_adapter(adapter, settled(adapter, tmp_path, data="data/"), None, ProcessContext())
    first, second = refused.value.problems
    assert first.startswith(f"{tmp_path}/data/train_data_type_A.jsonl: not found")
    assert f"pass it with --data (its run had {DATA.as_uri()}" in second


def test_prompts_of_its_own_have_to_be_named(adapter: Adapter, tmp_path: Path) -> None:
    """With other prompts, the verdict could silently change."""
    manifest = json.loads(json.dumps(adapter.manifest))
    manifest["config"]["evaluation"]["prompts"] = "s3://foreign/prompts.jsonl\x1b[2J"
    foreign = Adapter(adapter.storage, manifest)
    with pytest.raises(ConfigError) as refused:
        evaluate_adapter(foreign, settled(foreign, tmp_path), None, ProcessContext())
    (problem,) = refused.value.problems
    assert problem.startswith("evaluation.prompts: not given: pass its prompts with --prompts, or --set evaluation.prompts=none")
    assert r"s3://foreign/prompts.jsonl\x1b[2J" in problem
    # With the bundled prompts named explicitly, the evaluation gets as far as reading the data.
    with pytest.raises(NotFound, match="train_data_type_A"):
        evaluate_adapter(
            foreign, settled(foreign, tmp_path, **{"evaluation.prompts": None, "data": "data/"}), None, ProcessContext()
        )


@contextmanager
def listener() -> Iterator[tuple[str, list[str]]]:
    """Yield the URL of an HTTP server, and the Authorization header of each request it received."""
    got: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

        def do_POST(self) -> None:
            got.append(self.headers["authorization"])
            self.send_response(401)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", got
    finally:
        server.shutdown()
        server.server_close()


def test_a_foreign_manifest_does_not_get_the_key_sent_to_its_server(
    output: Storage, made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-the-users-own-key")
    with listener() as (url, got):
        config = settle(TOLD, {}).model_dump(mode="json")
        config["evaluation"] |= {"judge_model": "judge", "judge_base_url": url}
        foreign = open_adapter(publish(output, made, tmp_path, config=config))
        # end the evaluation after it has settled everything and before it imports torch
        (local(foreign) / "adapter_model.safetensors").write_bytes(b"WEIGHTS")
        with capture_logs() as said, pytest.raises(DamagedError, match="the file was changed"):
            evaluate_adapter(foreign, settled(foreign, tmp_path), None, ProcessContext())
        assert got == []
        assert [line["event"] for line in said if line["log_level"] == "warning"] == ["judge_left_out"]
        # naming a judge model does not restore the manifest's server either
        assert settled(foreign, tmp_path, **{"evaluation.judge_model": "mine"}).evaluation.judge_base_url != url
        # If the user names the same server, it receives the key, so the check above would have noticed it.
        named = {"evaluation.judge_model": "judge", "evaluation.judge_base_url": url}
        with pytest.raises(ConfigError, match="does not accept the API key"):
            evaluate_adapter(foreign, settled(foreign, tmp_path, **named), None, ProcessContext())
        assert got == ["Bearer sk-the-users-own-key"]


def test_without_a_held_out_record_it_ends_with_exit_3_before_the_adapter_is_loaded(adapter: Adapter, tmp_path: Path) -> None:
    """No record of the data fits 16 tokens, so there is nothing to measure held-out loss on."""
    pytest.importorskip("trl", reason="trl is not installed: the training stack can't be started")
    config = settled(adapter, tmp_path, **{"training.max_length_tokens": 16, "data": str(DATA.parent)})
    with pytest.raises(DataError, match=r"0 held out, expected at least one of each.*max_length_tokens \(16\)") as refused:
        evaluate_adapter(adapter, config, None, ProcessContext())
    assert refused.value.exit_code == 3


def test_bad_prompts_are_refused_before_anything_is_loaded(adapter: Adapter, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"input": "나 왔어"}\n')
    with pytest.raises(DataError, match=r"mine\.jsonl:1: context: got nothing"):
        evaluate_adapter(adapter, settled(adapter, tmp_path, **{"evaluation.prompts": str(prompts)}), None, ProcessContext())


def test_a_changed_bundle_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    (local(adapter) / "adapter_model.safetensors").write_bytes(b"WEIGHTS")
    with pytest.raises(DamagedError, match=r"adapter_model\.safetensors: got 7 bytes, .*; the file was changed"):
        evaluate_adapter(adapter, settled(adapter, tmp_path), None, ProcessContext())


def test_an_evaluation_has_no_adapter(adapter: Adapter, made: MadeRun, output: Storage, tmp_path: Path) -> None:
    later = fresh_folder(tmp_path / "later")
    write_made_evaluation(made, later)
    write_manifest(later, {name: value for name, value in adapter.manifest.items() if name not in ("files", "schema")})
    prefix = evaluation_prefix(bundle_prefix(BloodType.A, RUN_ID), "f" * 16)
    publish_bundle(later, output, prefix)
    opened = open_adapter(output.uri + prefix)
    with pytest.raises(ConfigError, match="holds an evaluation and no adapter; expected a bundle"):
        evaluate_adapter(opened, settled(opened, tmp_path), None, ProcessContext())
    with pytest.raises(ConfigError, match="expected a bundle in its place"):
        output_of(opened)


def test_the_report_does_not_go_into_a_bundle(adapter: Adapter, output: Storage, tmp_path: Path) -> None:
    """Its metrics.json would no longer match its manifest."""
    for folder in (local(adapter), link_newest(output, BloodType.A, RUN_ID)):
        with pytest.raises(ConfigError, match=r"--report-dir .*: holds a published bundle, which stays as it is"):
            evaluate_adapter(adapter, settled(adapter, tmp_path), folder, ProcessContext())
    (tmp_path / "taken").touch()
    for folder in (tmp_path / "taken", tmp_path / "taken" / "report"):
        with pytest.raises(ConfigError, match=r"--report-dir .*taken.*: cannot be made: "):
            evaluate_adapter(adapter, settled(adapter, tmp_path), folder, ProcessContext())
    assert verify_files(adapter.storage, "") == []


def test_what_evaluate_refuses_ends_with_one_line_and_a_code(
    adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        (tmp_path / "train_data_type_A.jsonl").write_bytes(DATA.read_bytes() + b"\n")
        for arguments, code, said in (
            (["--adapter", str(tmp_path)], 2, "no manifest.json of a run there"),
            (["--adapter", adapter.storage.uri, "--data", str(tmp_path)], 3, "pass it with --data"),
            (["--adapter", adapter.storage.uri, "--set", "blood_type=B"], 2, "the adapter is A's"),
            (["--adapter", adapter.storage.uri, "--report-dir", str(local(adapter))], 2, "holds a published bundle"),
            (["--adapter", adapter.storage.uri, "--data", str(DATA.parent)], 2, "pass that one with --base-model"),
        ):
            assert run_cli(["evaluate", *arguments, "--work-dir", str(tmp_path / "work"), "--log-format", "json"]) == code
            out, err = capsys.readouterr()
            assert out == ""
            assert "Traceback" not in err
            last = json.loads(err.splitlines()[-1])
            assert (last["event"], last["exit_code"], len(last["problems"])) == ("run_finished", code, 1)
            assert said in last["problems"][0]
    finally:
        logging.captureWarnings(capture=False)
        root.handlers[:] = handlers
        root.setLevel(level)
        for name in ("lora_trainer", "entrypoint"):
            logging.getLogger(name).setLevel(logging.NOTSET)
        structlog.contextvars.clear_contextvars()
        structlog.reset_defaults()


# -- promote --------------------------------------------------------------------------------------------


def pointed_at(output: Storage) -> dict[str, str]:
    found = output.read_bytes("adapters/A/latest.json")
    assert found is not None
    pointer: dict[str, str] = json.loads(found.data)
    return pointer


def test_promote_moves_whatever_is_newer(
    output: Storage, made: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = publish(output, made, tmp_path)
    newer = publish(output, made, tmp_path, "f" * 16, "2026-06-01T00:00:00+00:00")
    move_latest(output, BloodType.A, open_adapter(newer).manifest)
    assert pointed_at(output)["run_id"] == "f" * 16
    during = {**open_adapter(newer).manifest, "run_id": "during", "counter": take_count(output, BloodType.A)}
    assert run_cli(["promote", older]) == 0
    assert capsys.readouterr().out == f"{output.uri}adapters/A/latest.json: names run {RUN_ID} now; before: {'f' * 16}\n"
    assert (pointed_at(output)["run_id"], pointed_at(output)["bundle"]) == (RUN_ID, f"adapters/A/{RUN_ID}/")
    assert output.local_folder is not None
    link = output.local_folder / "adapter_A"
    assert json.loads((link / "manifest.json").read_text(encoding="utf-8"))["run_id"] == RUN_ID
    # neither the newer run nor a run that was training during the promotion replaces the promoted one
    assert not move_latest(output, BloodType.A, open_adapter(newer).manifest).moved
    an_hour = timedelta(hours=1)
    during |= {"started_at": (datetime.now(UTC) + an_hour).isoformat()}
    assert not move_latest(output, BloodType.A, during).moved
    assert pointed_at(output)["run_id"] == RUN_ID
    # a run that starts afterwards takes over as usual, whatever its clock says
    after = {**during, "run_id": "after", "counter": take_count(output, BloodType.A)}
    after |= {"started_at": (datetime.now(UTC) - an_hour).isoformat()}
    assert move_latest(output, BloodType.A, after).moved
    assert pointed_at(output)["run_id"] == "after"
    # promoting by the link's path works, too
    assert run_cli(["promote", str(link)]) == 0
    assert "before: after" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "metrics.json", "report.html"])
def test_promote_refuses_a_bundle_that_is_not_whole(
    output: Storage, made: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    uri = publish(output, made, tmp_path)
    assert output.local_folder is not None
    (output.local_folder / "adapters" / "A" / RUN_ID / file).unlink()
    assert run_cli(["promote", uri]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith(f"error: {uri}{file}: not found; the manifest says ")
    assert second.startswith(f"error: {uri}: not promoted")
    assert output.read_bytes("adapters/A/latest.json") is None


def test_promote_refuses_what_is_no_bundle(output: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["promote", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: file://{tmp_path}/: no manifest.json of a run there")
    assert output.read_bytes("adapters/A/latest.json") is None
