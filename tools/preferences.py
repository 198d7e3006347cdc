"""Build `data/preferences/*.jsonl` from the hand-written situations: pairs of replies in TRL's preference format.

    python tools/preferences.py            write the files
    python tools/preferences.py --check    write nothing; exit 1 if a file is out of date

Each line is `{"prompt": [...], "chosen": [...], "rejected": [...]}`, lists of messages as `trl.DPOTrainer` takes them. The prompt
and the chosen reply are one record of the persona's training data. The rejected reply is what another of the four friends said to
the same input: as fluent and as true to the situation, and the wrong friend. One pair a situation; the other friends take turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Final

from bundled_data import DATA, handwritten_families, run

from lora_trainer.generator.exchanges import WrittenReply
from lora_trainer.persona.prompt import prompt_messages, reply_json
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType

FOLDER: Final = DATA / "preferences"


def pairs(blood_type: BloodType) -> Iterator[dict[str, object]]:
    """Yield one persona's pairs, in the order of the situations."""
    instruction = persona_spec(blood_type).instruction
    situations = [situation for family in handwritten_families() for situation in family.situations]
    for number, situation in enumerate(situations):
        own = situation.replies.get(blood_type, ())
        others = [name for name in BloodType if name != blood_type and name in situation.replies]
        if not own or not others:
            continue
        chosen = own[number % len(own)]
        theirs = situation.replies[others[number % len(others)]]
        # the nearest intensity, so that the pair differs in the friend and not in the strength of the feeling
        rejected = min(theirs, key=lambda reply: abs(reply.intensity - chosen.intensity))
        if rejected.text == chosen.text:
            continue
        yield {
            "prompt": prompt_messages(instruction, situation.summary, chosen.feeling, chosen.intensity, situation.input),
            "chosen": [_answer(chosen)],
            "rejected": [_answer(rejected)],
        }


def _answer(reply: WrittenReply) -> dict[str, str]:
    return {"role": "assistant", "content": reply_json(reply.text, reply.emotion)}


def main() -> int:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    check = parser.parse_args().check
    FOLDER.mkdir(exist_ok=True)
    differ = 0
    for blood_type in BloodType:
        path = FOLDER / f"preferences_type_{blood_type}.jsonl"
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs(blood_type))
        is_same = path.exists() and path.read_text(encoding="utf-8") == text
        differ += not is_same
        if not check and not is_same:
            path.write_text(text, encoding="utf-8", newline="\n")
        state = "up to date" if is_same else "out of date" if check else "written"
        print(f"{path.relative_to(DATA.parent)}: {text.count(chr(10)):,} pairs, {state}")
    if check and differ:
        print("run python tools/preferences.py")
    return int(check and differ > 0)


if __name__ == "__main__":
    run(main)
