"""Fuzz the JSONL reader with atheris, which searches for bytes that reach new code.

    pip install atheris
    python tests/fuzz/fuzz_reader.py -max_total_time=300 [CORPUS]

The first byte selects plain, gzip or zstd, and whether the other bytes are the file itself or its content before compression.
Any exception is a finding. CI does not run this, because atheris has wheels only for Linux and few versions of Python.

"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lora_trainer", "json", "gzip"]):
    from lora_trainer.config import LimitsConfig
    from lora_trainer.data.jsonl import JsonlReader
    from lora_trainer.data.records import EvaluationPrompt, TrainingRecord

from backports import zstd

LIMITS = LimitsConfig(line_bytes=4096, text_characters=500, decompressed_bytes=2**16)
FOLDER = Path(tempfile.mkdtemp())


def test_one_input(data: bytes) -> None:
    """Read `data` as a file; each line must be a record or have at least one printable problem."""
    how, content = (data[0], data[1:]) if data else (0, b"")
    suffix = ("", ".gz", ".zst")[how % 3]
    if how & 64:
        content = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}[suffix](content)
    path = FOLDER / f"fuzzed.jsonl{suffix}"
    path.write_bytes(content)
    for line in JsonlReader(path, EvaluationPrompt if how & 128 else TrainingRecord, limits=LIMITS):
        if line.record is None and not line.problems:
            raise AssertionError("a line that is neither a record nor a problem")
        for problem in line.problems:
            if "\n" in problem.render("fuzzed.jsonl") or len(json.dumps(problem.as_json())) > 2000:
                raise AssertionError("a problem that is not one line")


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
