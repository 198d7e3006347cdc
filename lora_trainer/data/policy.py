"""Read the policy on hard topics. `assets/policy.ko.md` is a copy of `data/POLICY.ko.md` without its heading."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

_RULES: Final = "모든 어려운 이야기에서"
_NUMBERS: Final = "번호"
_TOPICS: Final = "주제별로"
_TAG: Final = re.compile("`([a-z_]+)`")


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy's Korean text by part."""

    rules: str
    """What holds on every hard topic, as a numbered list."""
    numbers: Mapping[str, str]
    """Number to call -> when to name it."""
    topics: Mapping[str, str]
    """Tag of a topic -> what the friend does."""


@cache
def policy() -> Policy:
    """Return the policy that ships with the package."""
    text = (resources.files("lora_trainer.data") / "assets" / "policy.ko.md").read_text(encoding="utf-8")
    sections = {title: body for title, _, body in (part.partition("\n") for part in f"\n{text}".split("\n## ")[1:])}
    return Policy(
        # the document breaks its lines for readers
        rules=re.sub("\n +", " ", sections[_RULES].strip()),
        numbers={cells[0]: cells[1] for cells in _rows(sections[_NUMBERS])},
        topics={tag: cells[1] for cells in _rows(sections[_TOPICS]) for tag in _TAG.findall(cells[0])},
    )


def _rows(section: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the section's table."""
    table = [line for line in section.splitlines() if line.startswith("|")]
    # the first two lines are the heading and its rule
    for line in table[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]
