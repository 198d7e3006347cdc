"""Publish made-up runs for reviews, and fill in a review page without a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from made_metrics import MadeRun, write_made_adapter, write_made_evaluation

from lora_trainer.store.manifest import write_manifest

RUN_ID = "0123456789abcdef"


def publish_made(output: Path, made: MadeRun, run_id: str = RUN_ID, change: Callable[[Path], object] | None = None) -> Path:
    """Write a whole bundle in its place below `output`. `change` may edit its files before they are hashed."""
    folder = output / "adapters" / "A" / run_id
    folder.mkdir(parents=True)
    write_made_adapter(folder)
    write_made_evaluation(made, folder)
    if change:
        change(folder)
    write_manifest(folder, made_facts(made, run_id))
    return folder


def made_facts(made: MadeRun, run_id: str, **changes: Any) -> dict[str, Any]:
    verdict = made.metrics.verdict
    facts = {**made.facts, "run_id": run_id, "gate_id": verdict.gate_id, "verdict": verdict.model_dump(mode="json")}
    return {**facts, **changes}


def data_of(page: str) -> dict[str, Any]:
    """Return the JSON in a review page."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data: dict[str, Any] = json.loads(found)
    return data


def adapter_replies(folder: Path) -> dict[tuple[str, float], str]:
    """Return the adapter's greedy replies by input and intensity."""
    lines = [json.loads(line) for line in (folder / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        (line["input"], line["intensity"]): line["reply"]
        for line in lines
        if (line["model"], line["decoding"]) == ("adapter", "greedy")
    }


def side_of_adapter(pair: Mapping[str, Any]) -> str:
    return "second" if bin(int(pair["id"], 16)).count("1") % 2 else "first"


def filled_in(
    page: str, choose: Callable[[int, str], str] = lambda number, adapter: "tie", reviewer: str = "김평가", **changes: Any
) -> dict[str, Any]:
    """Return what the page's file holds after a review. `choose` gets the pair's number and the side of the adapter."""
    data = data_of(page)
    answers = [
        {"id": pair["id"], "choice": choose(number, side_of_adapter(pair)), "marks": {"first": [], "second": []}, "note": ""}
        for number, pair in enumerate(data["pairs"])
    ]
    times = {"started_at": "2026-11-30T10:00:00.000Z", "finished_at": "2026-11-30T10:20:00.000Z"}
    return {**data["facts"], "reviewer": reviewer, **times, "answers": answers, **changes}
