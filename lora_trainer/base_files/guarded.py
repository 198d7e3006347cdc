"""Run what a base's files can make expensive, its chat template and its tokenizer, in a child process with limits.

A template is a program of whoever made the base. jinja2's sandbox keeps it from the machine, but not from looping or filling the
memory, and no check of its text bounds what it does with other texts. So every rendering of a foreign template, of the sample
here and of records and questions later, happens in a process with limits on processor time, memory and output. A start takes
0.1 s, and a call renders a whole data set.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_trainer.errors import ConfigError

_WORKER: Final = Path(__file__).with_name("guarded_worker.py")
_CPU_S: Final = 5.0
"""A tokenizer of 150,000 tokens loads in 0.5 s; a template renders in less than a millisecond."""
_CPU_S_PER_CHAT: Final = 0.01
_MEMORY_BYTES: Final = 3 * 2**30
_BATCH: Final = 4096
"""Conversations per process, so that a large data set fits into its memory."""
_CHARACTERS: Final = 2**16
"""Characters that a template may add to a conversation. A ChatML template adds 100."""
# the child needs no credentials
_PASSED_VARIABLES: Final = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "TZ")

Chat = tuple[Sequence[Mapping[str, object]], bool]
"""Messages, and whether to add the generation prompt."""


class GuardError(ConfigError):
    """A template or tokenizer that does not work within the limits."""

    def __init__(self, what: str, said: str = "") -> None:
        self.what = what
        """What happened, as message text that quotes neither the file nor a conversation."""
        self.said = said
        """The library's own words. They may quote both."""
        super().__init__(what)


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a `tokenizer.json` holds."""

    largest_id: int
    ids: dict[str, int | None]
    """The ids of the tokens asked for."""


def render_chats(template: str, variables: Mapping[str, Any], chats: Sequence[Chat]) -> list[str]:
    """Render each conversation as transformers' `apply_chat_template` does. Raises `GuardError`."""
    rendered: list[str] = []
    for at in range(0, len(chats), _BATCH):
        batch = chats[at : at + _BATCH]
        asked = {"text": template, "variables": dict(variables), "chats": batch, "max_characters": _most_characters(batch)}
        answer = _ask({"template": asked}, _CPU_S + _CPU_S_PER_CHAT * len(batch))["template"]
        if "problem" in answer:
            raise _error(answer)
        rendered.extend(answer["rendered"])
    return rendered


def load_tokenizer(text: str, tokens: Sequence[str], samples: Sequence[str]) -> TokenizerFacts:
    """Load a `tokenizer.json`, encode `samples`, and look up `tokens`. Raises `GuardError`."""
    answer = _ask({"tokenizer": {"text": text, "tokens": list(tokens), "samples": list(samples)}}, _CPU_S)["tokenizer"]
    if "problem" in answer:
        raise _error(answer)
    return TokenizerFacts(answer["largest_id"], dict(zip(tokens, answer["ids"], strict=True)))


def _most_characters(chats: Sequence[Chat]) -> int:
    given = sum(len(str(message["content"])) for messages, _ in chats for message in messages)
    # templates may repeat a text, for example with its escapes
    return 8 * given + _CHARACTERS * len(chats)


def _error(answer: Mapping[str, str]) -> GuardError:
    kinds = {
        "memory": f"needs more than {_MEMORY_BYTES // 2**30} GiB of memory",
        "output": "writes without end",
        "RecursionError": "is nested too deeply",
    }
    return GuardError(kinds.get(answer["problem"], f"fails with {answer['problem']}"), answer["said"])


def _ask(request: Mapping[str, Any], cpu_s: float) -> dict[str, Any]:
    cpu_s = int(cpu_s)
    try:
        done = subprocess.run(  # noqa: S603  our own script
            # -P: the script's folder has modules that must not stand in for Python's
            [sys.executable, "-P", str(_WORKER), str(cpu_s), str(_MEMORY_BYTES)],
            input=json.dumps(request).encode(),
            capture_output=True,
            env={name: os.environ[name] for name in _PASSED_VARIABLES if name in os.environ} | {"TOKENIZERS_PARALLELISM": "false"},
            # processor time is the limit that holds; on a crowded machine it takes longer
            timeout=2 * cpu_s + 10,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise GuardError("does not end") from None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise GuardError(f"takes more than {cpu_s} s of processor time")
    if done.returncode:
        # an allocation that fails in native code aborts the process
        raise GuardError(f"needs more than {_MEMORY_BYTES // 2**30} GiB of memory, or breaks its library")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
