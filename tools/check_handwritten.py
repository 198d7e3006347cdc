"""Check files of data/handwritten while they are written: python tools/check_handwritten.py FILE..."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lora_trainer.lint import emoji_count, has_question, intensity_third, lint_reply, normalized, sentence_count
from lora_trainer.records import TrainingRecord

TYPES = ("A", "B", "O", "AB")


def main() -> None:
    said: dict[str, str] = {}
    inputs: dict[str, str] = {}
    cells = {t: Counter() for t in TYPES}
    questions, total, emoji = Counter(), Counter(), {t: {} for t in TYPES}
    specs = {t: yaml.safe_load(Path(f"lora_trainer/persona_specs/{t}.yaml").read_text()) for t in TYPES}
    situations = 0
    bad = 0

    def complain(where: str, what: str) -> None:
        nonlocal bad
        bad += 1
        print(f"{where}: {what}")

    for name in sys.argv[1:]:
        document = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        for family in document["families"]:
            for number, situation in enumerate(family["situations"], 1):
                where = f"{name}: {family['family']} {number}"
                situations += 1
                if set(situation) != {"summary", "input", "replies"}:
                    complain(where, f"keys {sorted(situation)}")
                    continue
                key = normalized(situation["input"])
                if key in inputs:
                    complain(where, f"input again, as in {inputs[key]}")
                inputs[key] = where
                for t, reply in situation["replies"].items():
                    spot = f"{where} {t}"
                    try:
                        record = TrainingRecord.model_validate(
                            {
                                "instruction": "x",
                                "context": {
                                    "summary": situation["summary"],
                                    "current_emotion": {"type": reply["feeling"], "intensity": reply["intensity"]},
                                },
                                "input": situation["input"],
                                "output": {"text": reply["text"], "emotion": reply["emotion"]},
                            }
                        )
                    except Exception as error:
                        complain(spot, str(error).replace("\n", " ")[:300])
                        continue
                    third = str(intensity_third(record.context.current_emotion.intensity))
                    text = record.reply.text
                    for problem in lint_reply(text, record.context.current_emotion.intensity):
                        complain(spot, f"{problem.code}: {problem.got}; {text}")
                    count = emoji_count(text)
                    if count > specs[t]["emoji"]["most"][third]:
                        complain(spot, f"{count} emoji at {third}, at most {specs[t]['emoji']['most'][third]}; {text}")
                    if sentence_count(text) == 0:
                        complain(spot, f"no sentence; {text}")
                    if len(text) > 90:
                        complain(spot, f"{len(text)} characters, at most 90; {text}")
                    key = normalized(text)
                    if key in said:
                        complain(spot, f"reply again, as in {said[key]}")
                    said[key] = spot
                    total[t] += 1
                    questions[t] += has_question(text)
                    cells[t][reply["feeling"], third] += 1
                    emoji[t].setdefault(third, []).append(count)
    print(f"{situations} situations, {sum(total.values())} replies, {bad} problems")
    if not total:
        return
    for t in TYPES:
        means = {k: round(sum(v) / len(v), 2) for k, v in sorted(emoji[t].items())}
        print(f"{t}: {total[t]} replies, {questions[t] / max(1, total[t]):.0%} ask, emoji {means}")
    feelings = ["neutral", "happy", "excited", "love", "surprised", "worried", "sad", "angry", "embarrassed", "tired"]
    print("records by feeling: low/middle/high for " + ", ".join(TYPES))
    for f in feelings:
        print(f"  {f:12}" + "   ".join("/".join(f"{cells[t][f, th]:2}" for th in ("low", "middle", "high")) for t in TYPES))


main()
