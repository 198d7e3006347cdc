"""Test `lora-trainer compare` on local bundles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_depth import all_replies, measured
from made_metrics import made_run, write_bundle

from entrypoint.cli import run_cli
from lora_trainer.errors import ExitCode
from lora_trainer.evaluate.metrics import METRICS_SCHEMA
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.report.comparison import compare

EXPECTED = f"expected metrics of schema {METRICS_SCHEMA}"
FIRST, SECOND, THIRD = "0123456789abcdef", "1111222233334444", "fedcba9876543210"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two runs of A that differ in two settings, and one of B that missed its gates."""
    folder = tmp_path_factory.mktemp("outputs")
    other = (("lora.r", 32), ("training.learning_rate", 1e-4))
    write_bundle(made_run(BloodType.A, run_id=FIRST, prompts=30, judged_by_model=True), folder / "first")
    write_bundle(made_run(BloodType.A, run_id=SECOND, prompts=30, settings=other), folder / "second")
    write_bundle(made_run(BloodType.B, run_id=THIRD, prompts=30, flaws=0.3), folder / "third")
    return folder


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def rows_of(text: str) -> dict[str, list[str]]:
    """Return the table's rows by their first cell."""
    found = [[cell.strip() for cell in line.split("   ") if cell.strip()] for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in found if cells}


def test_two_runs_of_one_persona(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["compare", str(bundles / "first"), f"file://{bundles}/second/"]) == ExitCode.DONE
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert rows["A 01234567"] == ["A 11112222"]
    assert rows["persona"] == ["A 다정", "A 다정"]
    assert rows["run"] == [FIRST, SECOND]
    assert rows["loss (base)"] == ["1.238 (3.217)"] * 2
    greedy = made_run(BloodType.A, run_id=FIRST, prompts=30, judged_by_model=True).metrics.evaluation.greedy
    estimate = greedy.adapter.persona
    assert estimate.lower is not None
    assert estimate.upper is not None
    assert rows["Recognised as this persona"][0] == f"{estimate.value:.1%} ({100 * estimate.lower:.1f}–{estimate.upper:.1%})"
    assert rows["Win rate against the base"][0].startswith(f"{greedy.win_rate.value:.1%} (")
    assert rows["steps"] == ["180", "180"]
    assert rows["Judge's preference"] == ["86.2% (82.1–90.0%)", "–"]
    # the table lists only settings that differ
    settings = out[out.index("\n Settings") :]
    assert list(rows_of(settings))[1:3] == ["lora.r", "training.learning_rate"]
    assert rows["lora.r"] == ["16", "32"]
    assert rows["training.learning_rate"] == ["0.0005", "0.0001"]
    assert "training.epochs" not in out
    assert "Predicted persona" not in out


def test_a_deep_evaluation_is_compared_with_a_run_without_one(
    bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = made_run(BloodType.A, run_id=THIRD, prompts=30)
    depth = measured(all_replies("adapter", good=True), all_replies("base", good=False))
    evaluation = made.metrics.evaluation.model_copy(update={"depth": depth})
    write_bundle(replace(made, metrics=made.metrics.model_copy(update={"evaluation": evaluation})), tmp_path / "deep")
    assert run_cli(["compare", str(bundles / "second"), str(tmp_path / "deep")]) == ExitCode.DONE
    rows = rows_of(capsys.readouterr().out)
    holds = depth.adapter.pressure.holds
    assert rows["Holds under pressure"] == ["–", f"100.0% ({100 * holds.lower:.1f}–100.0%)"]
    assert rows["Right answers, less the base's"] == ["–", "+100 points"]
    assert rows["Conversations: recalls what was said"][1].startswith("100.0%")


def test_several_personas_show_the_whole_confusion_matrix(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["compare", *(str(bundles / name) for name in ("first", "second", "third"))]) == ExitCode.DONE
    out = capsys.readouterr().out
    matrix = rows_of(out[out.index("Predicted persona, readable replies") :])
    assert matrix["replies of"] == ["A", "B", "O", "AB"]
    for name, run_id, blood_type, flaws in (("A 01234567", FIRST, BloodType.A, None), ("B fedcba98", THIRD, BloodType.B, 0.3)):
        made = made_run(blood_type, run_id=run_id, prompts=30, **({"judged_by_model": True} if flaws is None else {"flaws": flaws}))
        counts = made.metrics.evaluation.greedy.adapter.taken_for
        assert matrix[name] == [f"{counts[persona] / sum(counts.values()):.1%}" for persona in BloodType]
    rows = rows_of(out)
    assert rows["verdict"][2] == "✗ not passed"
    assert "Exact JSON by 0." in out


@pytest.mark.parametrize("columns", [80, 120])
def test_it_fits_the_terminal(
    columns: int, bundles: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", str(columns))
    runs = [str(bundles / name) for name in ("first", "second", "third", "first")]
    assert run_cli(["compare", *runs]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert max(cell_len(line) for line in out.splitlines()) <= columns
    # the table does not break numbers across lines
    for part in (FIRST[:8], "86.2%", "(82.1–90.0%)", "1.238", "✗ not passed"):
        assert part in out


def test_json(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["compare", "--json", str(bundles / "first"), str(bundles / "third")]) == ExitCode.DONE
    document = json.loads(capsys.readouterr().out)
    assert [run["uri"] for run in document["runs"]] == [f"file://{bundles}/first/", f"file://{bundles}/third/"]
    for run, name in zip(document["runs"], ("first", "third"), strict=True):
        assert run["metrics"] == json.loads((bundles / name / "metrics.json").read_text(encoding="utf-8"))
    assert document["settings"] == {}
    assert document["notes"] == []


def test_html(bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "pages" / "compare.html"
    runs = [str(bundles / name) for name in ("first", "second", "third")]
    assert run_cli(["compare", *runs, "--html", str(target)]) == ExitCode.DONE
    assert f"page: {target}" in capsys.readouterr().out
    page = target.read_text(encoding="utf-8")
    assert '<table class="compare">' in page
    assert 'id="matrix"' in page
    for text in (FIRST, SECOND, THIRD, "learning_rate", "다정", "솔직", "✗ not passed"):
        assert text in page
    for tag in ("<script", "<img", "<iframe", "url(", "@import", "http"):
        assert tag not in page
    assert run_cli(["compare", *runs[:2], "--html", str(target)]) == ExitCode.DONE
    assert 'id="matrix"' not in target.read_text(encoding="utf-8")


def test_a_later_evaluation_is_a_run_too(bundles: Path, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    shutil.copytree(bundles / "first", folder / "evaluations" / "0011223344556677")
    found = compare([str(bundles / "second"), str(folder / "evaluations" / "0011223344556677")])
    assert [run.metrics.run_id for run in found.runs] == [SECOND, FIRST]


def edited(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / name
    document = json.loads(path.read_text(encoding="utf-8"))
    edit(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_what_makes_them_hard_to_compare_is_said(bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(bundles / "first", tmp_path / "other")
    edited(folder, "metrics.json", lambda document: document["evaluation"].update(evaluation_id="0" * 16))
    edited(folder, "manifest.json", lambda document: (document["base"].update(identity="x"), document["data"].update(sha256="y")))
    assert run_cli(["compare", str(bundles / "first"), str(folder), "--html", str(tmp_path / "x.html")]) == ExitCode.DONE
    out = capsys.readouterr().out
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    for said in ("(evaluation_id)", "differ in base model", "differ in training data"):
        assert said in out
        assert said in page
    assert rows_of(out)["base model"] == ["Qwen/Qwen2.5-7B-Instruct"] * 2


def test_one_run_is_not_enough(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["compare", str(bundles / "first")]) == ExitCode.CONFIG
    assert capsys.readouterr().err == "error: compare: got 1 run, expected at least two: lora-trainer compare RUN RUN...\n"
    assert run_cli(["compare"]) == ExitCode.CONFIG
    assert "Missing argument 'RUN RUN...'" in capsys.readouterr().err


def test_no_bundle_there(bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["compare", str(bundles / "first"), str(tmp_path / "a"), str(tmp_path / "b")]) == ExitCode.CONFIG
    assert capsys.readouterr().err.splitlines() == [
        f"error: file://{tmp_path}/{name}/: got no manifest.json, expected a finished bundle, such as "
        "<output>/adapters/A/<run id>/; check the path"
        for name in ("a", "b")
    ]


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        (
            "metrics.json",
            lambda d: d.update(schema=1),
            "schema: got 1; expected 3",
        ),
        (
            "metrics.json",
            lambda d: d.update(new=1),
            "new: got 1; extra inputs are not permitted",
        ),
        ("metrics.json", lambda d: d.pop("verdict"), "verdict: got nothing; field required"),
        ("metrics.json", None, "not JSON"),
        ("manifest.json", lambda d: d.update(schema=99), "not a manifest of schema 1"),
        ("manifest.json", lambda d: (d.pop("base"), d.pop("config")), "got no base, config; expected the manifest of a run"),
    ],
)
def test_a_bundle_that_cannot_be_read(
    name: str,
    edit: Callable[[dict[str, Any]], object] | None,
    said: str,
    bundles: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(bundles / "first", tmp_path / "broken")
    if edit is None:
        (folder / name).write_text("not json", encoding="utf-8")
    else:
        edited(folder, name, edit)
    assert run_cli(["compare", str(folder), str(bundles / "second")]) == ExitCode.CONFIG
    line, *more = capsys.readouterr().err.splitlines()
    assert not more or (name == "manifest.json") or EXPECTED in more[0]
    assert line.startswith(f"error: file://{folder}/{name}: {said}")


def test_metrics_that_are_gone(bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(bundles / "first", tmp_path / "broken")
    (folder / "metrics.json").unlink()
    assert run_cli(["compare", str(folder), str(bundles / "second")]) == ExitCode.CONFIG
    assert capsys.readouterr().err == (
        f"error: file://{folder}/metrics.json: missing, although manifest.json exists; the bundle is damaged: "
        "move it away and run again\n"
    )
    # both problems are reported
    assert run_cli(["compare", str(folder), str(tmp_path / "nowhere")]) == ExitCode.CONFIG
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(("target", "said"), [("out/", "names no object"), ("ftp://x/y.html", "unknown scheme")])
def test_a_page_that_cannot_be_written(target: str, said: str, bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["compare", str(bundles / "first"), str(bundles / "second"), "--html", target]) == ExitCode.CONFIG
    assert said in capsys.readouterr().err
