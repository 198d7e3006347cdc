"""Compare how reliably and at what cost xgrammar, llguidance and outlines hold replies to a schema on a real tokenizer.

    python benchmarks/constrained_decoding.py --tokenizer FOLDER [--only llguidance]

FOLDER holds Qwen2.5's tokenizer. Each library compiles two schemas: the published one, and the strict one, whose pattern also
covers the requirements of `Reply` on a text. Each pair of library and schema runs on one thread of its own process, which measures
import, tokenizer and compilation, then the work per token at batch 1 (compute the mask, apply it to 152,064 logits, accept the
token) on bundled replies and on walks drawn from random logits at temperature 1.5, as an untrained model would produce them. CPU
time keeps the numbers comparable on a busy machine. Every walk must be compact JSON, follow the published schema and pass the
project's `Reply`. The grammar must accept a few given replies and reject a few others.

Writes benchmarks/results/constrained-decoding.json. The benchmark skips libraries that are not installed and records those that
exceed the limits of time or memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.records import Reply
from lora_trainer.persona.prompt import reply_json
from lora_trainer.persona.reply_schema import response_schema
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.train.constrained_decoding import most_tokens, strict_schema

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("xgrammar", "llguidance", "outlines")
PUBLISHED = response_schema()
SCHEMAS = {"published": PUBLISHED, "strict": strict_schema(PUBLISHED)}
LOGITS = 152_064
"""Rows of Qwen2.5-7B's output layer, more than the tokenizer has tokens."""
REPLIES = 40
"""Number of bundled replies per persona."""
WALKS = 200
TEMPERATURE = 1.5
ALLOWED_S = 300
ALLOWED_GIB = 12
LONGEST = 200


def reply(text: str) -> str:
    """Return a reply with `text` inserted verbatim, without escaping."""
    return f'{{"text":"{text}","emotion":"smile"}}'


GOOD = {
    "Korean and an emoji": reply("오! 나 금방 도착해! 😊"),
    "200 characters": reply("가" * LONGEST),
    "200 emoji": reply("😊" * LONGEST),
    "an escaped quotation mark": reply(r"\"응\" 하고 말했어"),
    "an escaped backslash": reply(r"ㅎ\\ㅎ"),
}
BAD = {
    "201 characters": reply("가" * (LONGEST + 1)),
    "201 escapes": reply(r"\"" * (LONGEST + 1)),
    "no text": reply(""),
    "nothing to see": reply(" \u200b\u3164"),
    "a control character": reply("응\x01"),
    "an escaped control character": reply(r"응\u0001"),
    "a line break": reply("응\n응"),
    "half of a surrogate pair": reply(r"응\ud83d"),
    "a quotation mark": reply('응" 응'),
    "a space after the colon": '{"text": "응","emotion":"smile"}',
    "emotion first": '{"emotion":"smile","text":"응"}',
    "an unknown emotion": '{"text":"응","emotion":"happy"}',
    "a third key": '{"text":"응","emotion":"smile","a":1}',
    "trailing text": reply("응") + " ",
}


@dataclass(frozen=True, slots=True)
class Session:
    """The constraint on one reply in progress."""

    fill: Callable[[], None]
    """Compute the mask."""
    apply: Callable[[Any], Any]
    """Return the logits [1, LOGITS] with the mask applied."""
    accept: Callable[[int], bool]
    """Accept a token. Return False if the grammar forbids it."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A schema compiled for a tokenizer."""

    session: Callable[[], Session]
    tokenizer_s: float
    compile_s: float


def xgrammar(tokenizer: Any, schema: dict[str, Any]) -> Compiled:
    """Compile with xgrammar: a pushdown automaton that precomputes the masks of most tokens."""
    import xgrammar as xgr

    clock = time.process_time()
    compiler = xgr.GrammarCompiler(xgr.TokenizerInfo.from_huggingface(tokenizer, vocab_size=LOGITS), max_threads=1)
    tokenizer_s = time.process_time() - clock
    clock = time.process_time()
    grammar = compiler.compile_json_schema(json.dumps(schema), any_whitespace=False, separators=(",", ":"))
    compile_s = time.process_time() - clock

    def session() -> Session:
        matcher = xgr.GrammarMatcher(grammar)
        mask = xgr.allocate_token_bitmask(1, LOGITS)

        def apply(logits: Any) -> Any:
            xgr.apply_token_bitmask_inplace(logits, mask)
            return logits

        return Session(lambda: matcher.fill_next_token_bitmask(mask), apply, matcher.accept_token)

    return Compiled(session, tokenizer_s, compile_s)


def llguidance(tokenizer: Any, schema: dict[str, Any]) -> Compiled:
    """Compile with llguidance as `lora_trainer.constrained` does: regex-derivative lexer, Earley parser, masks on demand."""
    import numpy as np
    import torch
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    clock = time.process_time()
    wrapped = from_tokenizer(tokenizer, eos_token=tokenizer.eos_token_id)
    tokenizer_s = time.process_time() - clock
    compact = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
    clock = time.process_time()
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=compact)
    if problem := LLMatcher.validate_grammar(grammar, wrapped):
        raise ValueError(problem)
    compile_s = time.process_time() - clock

    def session() -> Session:
        matcher = LLMatcher(wrapped, grammar, log_level=0)
        mask = allocate_token_bitmask(1, wrapped.vocab_size)

        def apply(logits: Any) -> Any:
            allowed = np.unpackbits(mask.view(np.uint8), axis=1, count=LOGITS, bitorder="little")
            return logits.masked_fill(torch.from_numpy(allowed == 0), float("-inf"))

        return Session(lambda: fill_next_token_bitmask(matcher, mask), apply, matcher.consume_token)

    return Compiled(session, tokenizer_s, compile_s)


def outlines(tokenizer: Any, schema: dict[str, Any]) -> Compiled:
    """Compile with outlines as its transformers backend does: a finite automaton over the whole vocabulary."""
    from outlines.backends.outlines_core import OutlinesCoreBackend
    from outlines.models.transformers import TransformerTokenizer
    from outlines_core import Guide, Index
    from outlines_core.json_schema import build_regex_from_schema
    from outlines_core.kernels.torch import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask

    clock = time.process_time()
    vocabulary = OutlinesCoreBackend.create_outlines_core_vocabulary(
        tokenizer.get_vocab(), tokenizer.eos_token_id, tokenizer.eos_token, TransformerTokenizer(tokenizer).convert_token_to_string
    )
    tokenizer_s = time.process_time() - clock
    clock = time.process_time()
    index = Index(build_regex_from_schema(json.dumps(schema), whitespace_pattern=""), vocabulary)
    compile_s = time.process_time() - clock

    def session() -> Session:
        guide = Guide(index)
        mask = allocate_token_bitmask(LOGITS)

        def apply(logits: Any) -> Any:
            apply_token_bitmask_inplace(logits, mask)
            return logits

        def accept(token: int) -> bool:
            # skip this check, as its backend does: the mask allows the end of the turn, but the guide rejects it
            if guide.is_finished() and token == tokenizer.eos_token_id:
                return True
            allowed = bool(guide.accepts_tokens([token]))
            if allowed:
                guide.advance(token, return_tokens=False)
            return allowed

        return Session(lambda: fill_next_token_bitmask(guide, mask), apply, accept)

    return Compiled(session, tokenizer_s, compile_s)


class Clock:
    """CPU seconds of each part of the work per token."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {"mask": [], "apply": [], "accept": []}

    def timed(self, part: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of `work` and record its CPU time."""
        clock = time.process_time()
        found = work(*arguments)
        self.parts[part].append(time.process_time() - clock)
        return found

    def summary(self) -> dict[str, float]:
        """Return statistics of the microseconds per token."""
        total = sorted(map(sum, zip(*self.parts.values(), strict=True)))
        us = 1e6
        return {
            "tokens": len(total),
            "median_us": round(statistics.median(total) * us),
            "mean_us": round(statistics.mean(total) * us),
            "p99_us": round(total[int(len(total) * 0.99)] * us),
            **{f"{part}_median_us": round(statistics.median(seconds) * us) for part, seconds in self.parts.items()},
        }


def takes(session: Session, tokens: list[int], clock: Clock) -> bool:
    """Return whether the session allows `tokens` in sequence."""
    import torch

    for token in tokens:
        logits = torch.zeros(1, LOGITS)
        clock.timed("mask", session.fill)
        allowed = bool(torch.isfinite(clock.timed("apply", session.apply, logits)[0, token]))
        if not (clock.timed("accept", session.accept, token) and allowed):
            return False
    return True


def walk(session: Session, end: int, seed: int, clock: Clock) -> tuple[list[int], str]:
    """Draw tokens from random logits up to the end-of-turn token. Return them and a fault, empty if there is none."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while len(tokens) < most_tokens(PUBLISHED):
        logits = torch.randn(1, LOGITS, generator=draw)
        clock.timed("mask", session.fill)
        masked = clock.timed("apply", session.apply, logits)
        token = int(torch.multinomial(torch.softmax(masked / TEMPERATURE, dim=-1), 1, generator=draw))
        if not clock.timed("accept", session.accept, token):
            return tokens, "its mask allows a token that it does not accept"
        if token == end:
            return tokens, ""
        tokens.append(token)
    return tokens, "cut by the limit"


def fault_of(text: str) -> str:
    """Return the fault of a finished reply, empty if there is none."""
    try:
        found = json.loads(text)
    except ValueError as error:
        return f"not JSON: {re.split(' at|:', str(error))[0].lower()}"
    properties: Any = PUBLISHED["properties"]
    if not isinstance(found, dict) or list(found) != list(properties) or found["emotion"] not in properties["emotion"]["enum"]:
        return "not by the schema"
    if not 1 <= len(found["text"]) <= properties["text"]["maxLength"]:
        return "a text that is too long or empty"
    try:
        Reply.model_validate_json(text)
    except ValueError:
        return "refused by Reply"
    exact = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    return "" if text == exact else "not as json.dumps writes it"


def bundled() -> list[str]:
    """Return bundled replies of all personas in the form that training uses."""
    found = []
    for blood_type in BloodType:
        lines = JsonlReader(ROOT / "data" / f"train_data_type_{blood_type}.jsonl")
        replies = [line.record.reply for line in lines if line.record]
        found += [reply_json(reply.text, reply.emotion) for reply in replies[:: len(replies) // REPLIES][:REPLIES]]
    return found


def measure(library: str, schema: str, folder: Path) -> dict[str, Any]:
    """Measure one library with one schema: set-up times, times per token and the faults of its replies."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    clock = time.process_time()
    importlib.import_module(library)
    import_s = time.process_time() - clock
    compiled = {"xgrammar": xgrammar, "llguidance": llguidance, "outlines": outlines}[library](tokenizer, SCHEMAS[schema])

    def tokens_of(text: str) -> list[int]:
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    # warm-up: some libraries compile their kernels on first use
    takes(compiled.session(), tokens_of(reply("응")), Clock())
    along, drawn, unmeasured = Clock(), Clock(), Clock()
    texts = bundled()
    refused = sum(not takes(compiled.session(), tokens_of(text), along) for text in texts)
    faults: Counter[str] = Counter()
    longest = 0
    for seed in range(WALKS):
        tokens, fault = walk(compiled.session(), tokenizer.eos_token_id, seed, drawn)
        longest = max(longest, len(tokens))
        if fault := fault or fault_of(tokenizer.decode(tokens, clean_up_tokenization_spaces=False)):
            faults[fault] += 1
    return {
        "import_s": round(import_s, 3),
        "tokenizer_s": round(compiled.tokenizer_s, 2),
        "compile_s": round(compiled.compile_s, 4),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "on_replies": along.summary(),
        "on_walks": drawn.summary(),
        "bundled_replies": len(texts),
        "bundled_replies_refused": refused,
        "good_refused": [name for name, text in GOOD.items() if not takes(compiled.session(), tokens_of(text), unmeasured)],
        "bad_accepted": [name for name, text in BAD.items() if takes(compiled.session(), tokens_of(text), unmeasured)],
        "walks": WALKS,
        "walks_longest_tokens": longest,
        "walks_faulty": sum(faults.values()),
        "walk_faults": dict(faults),
    }


def limited() -> None:
    """Limit the child's memory."""
    resource.setrlimit(resource.RLIMIT_AS, (ALLOWED_GIB * 2**30,) * 2)


def in_a_process(library: str, schema: str, folder: Path) -> dict[str, Any]:
    """Run `measure` in a child process with limits of time and memory."""
    command = [sys.executable, __file__, "--tokenizer", str(folder), "--measure", library, schema]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=ALLOWED_S, preexec_fn=limited
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {ALLOWED_S} s"}
    if done.returncode < 0:
        return {"failed": f"ended by signal {-done.returncode} (limit of memory: {ALLOWED_GIB} GiB)"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": lines[-1][:300] if lines else f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure all libraries with both schemas and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with Qwen2.5's tokenizer")
    parser.add_argument("--only", choices=LIBRARIES, help="print this library's numbers and write nothing")
    parser.add_argument("--measure", nargs=2, metavar=("LIBRARY", "SCHEMA"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        library, schema = arguments.measure
        print("\n" + json.dumps(measure(library, schema, arguments.tokenizer)))
        return 0
    results: dict[str, dict[str, Any]] = {}
    for name in (arguments.only,) if arguments.only else LIBRARIES:
        if importlib.util.find_spec(name) is None:
            print(f"{name}: not installed, skipped")
            continue
        results[name] = {schema: in_a_process(name, schema, arguments.tokenizer) for schema in SCHEMAS}
        print(name, json.dumps(results[name], indent=2), flush=True)
    if arguments.only:
        return 0
    document = {
        "command": "python benchmarks/constrained_decoding.py --tokenizer <Qwen2.5's tokenizer>",
        "machine": f"{platform.machine()}, one thread of {os.cpu_count()} CPUs",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", *results)},
        "logits": LOGITS,
        "temperature": TEMPERATURE,
        "limits": {"seconds": ALLOWED_S, "memory_gib": ALLOWED_GIB},
        "results": results,
    }
    target = ROOT / "benchmarks" / "results" / "constrained-decoding.json"
    target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
