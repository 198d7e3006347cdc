"""Run the JSONL reader on files that nobody would write by hand: it never crashes, loses a valid line or moves one."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_trainer.data.duplicates import near_fingerprint
from lora_trainer.data.file_kinds import diagnosis
from lora_trainer.data.jsonl import JsonlReader, Line, parse_record
from lora_trainer.data.korean import formal_endings, sentence_count, sentences
from lora_trainer.data.lint import RULES, blood_types_named, has_question, lint_reply
from lora_trainer.data.records import Context, CurrentEmotion, Reply, TrainingRecord
from lora_trainer.data.validation import check_file
from lora_trainer.persona.emoji import emoji_count
from lora_trainer.persona.vocabulary import Expression, Feeling
from lora_trainer.report.validation_table import validation_table

# no controls, noncharacters, private-use or invisible characters, nor what replaces lost ones: they are findings
writable = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Cf", "Cn", "Co", "Lo", "Mn"), exclude_characters="\ufffc\ufffd\\&%=<_")
)
# append a visible character, so that the text is not blank
words = writable.map(lambda text: text + "말")


def build(instruction: str, summary: str, feeling: Feeling, intensity: float, said: str, reply: Reply) -> TrainingRecord:
    emotion = CurrentEmotion(type=feeling, intensity=intensity)
    return TrainingRecord(
        instruction=instruction, context=Context(summary=summary, current_emotion=emotion), input=said, reply=reply
    )


records = st.builds(
    build,
    words,
    writable,
    st.sampled_from(Feeling),
    st.floats(0, 1),
    words,
    st.builds(Reply, text=words, emotion=st.sampled_from(Expression)),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(
    ["instruction", "context", "input", "output", "summary", "current_emotion", "type", "intensity", "text", "emotion"]
)
# bytes without a line break that cannot be a record
garbage = st.one_of(
    st.binary(max_size=80),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(fields, json_values | st.dictionaries(fields, json_values)).map(lambda value: json.dumps(value).encode()),
    records.map(lambda record: record.to_json().encode()[:-2]),
    st.sampled_from([b"", b"   ", b"\t", b"\xef\xbb\xbf", b"{" * 2000, b"[" * 2000, b"\x00", b"\xff", b'{"input": "\\ud800"}']),
).map(lambda raw: raw.replace(b"\n", b" "))


def lines_of(content: bytes) -> list[Line]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.jsonl"
        file.write_bytes(content)
        return list(JsonlReader(file))


@given(st.binary(max_size=400) | st.lists(garbage).map(b"\n".join))
def test_no_file_ends_in_a_traceback(content: bytes) -> None:
    for line in lines_of(content):
        assert line.record is not None or line.problems
        for problem in line.problems:
            assert "\n" not in problem.render("data.jsonl")
            json.dumps(problem.as_json()).encode("ascii")


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200) | st.lists(garbage | records.map(lambda record: record.to_json().encode())).map(b"\n".join))
def test_no_file_ends_in_a_traceback_when_it_is_checked(content: bytes) -> None:
    class Bytes:
        def count_tokens(self, texts: list[str]) -> list[int]:
            return [len(text.encode()) for text in texts]

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.jsonl"
        file.write_bytes(content)
        report = check_file(file, None, Bytes())
    assert validation_table(report)
    json.dumps(report.as_json())
    assert report.records + report.errors > 0


@given(st.lists(records | garbage), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_no_valid_line_is_lost_or_moved(mixed: list[TrainingRecord | bytes], line_end: bytes, ends_with_line_end: bool) -> None:
    raw = [one if isinstance(one, bytes) else one.to_json().encode() for one in mixed]
    content = line_end.join(raw) + (line_end if ends_with_line_end else b"")
    # The whole file may look like another format, which is one problem. Files with as many records as other lines never do,
    # unless their first bytes say so.
    if fault := diagnosis(content, is_whole=True):
        valid_lines = sum(isinstance(one, TrainingRecord) for one in mixed)
        assert valid_lines < len(mixed) / 2 or fault.code in ("wrong_format", "wrong_encoding", "compressed")
        return
    valid = [(number, one) for number, one in enumerate(mixed, 1) if isinstance(one, TrainingRecord)]
    assert [(line.number, line.record) for line in lines_of(content) if line.record is not None] == valid


@given(records)
def test_a_record_survives_being_written_and_read(record: TrainingRecord) -> None:
    text = record.to_json()
    assert "\n" not in text
    assert parse_record(text) == Line(1, record, ())


@example(
    TrainingRecord.model_validate(
        {
            "instruction": "\xa0말",
            "context": {"summary": "", "current_emotion": {"type": "neutral", "intensity": 0.5}},
            "input": "말",
            "output": {"text": "말", "emotion": "smile"},
        }
    ),
    164,
)
@given(records, st.integers(min_value=1, max_value=200))
def test_a_cut_off_last_line_is_never_taken_for_a_record(record: TrainingRecord, cut: int) -> None:
    whole = record.to_json().encode()
    (line,) = lines_of(whole[: max(1, len(whole) - cut)])
    assert line.record is None
    assert [problem.code for problem in line.problems] == ["truncated"]


@given(json_values, fields)
def test_no_json_value_in_a_field_ends_in_a_traceback(value: Any, field: str) -> None:
    data: dict[str, Any] = {
        "instruction": "a",
        "context": {"summary": "", "current_emotion": {"type": "happy", "intensity": 0.5}},
        "input": "b",
        "output": {"text": "c", "emotion": "smile"},
    }
    for place in (data, data["context"], data["context"]["current_emotion"], data["output"]):
        before = dict(place)
        place[field] = value
        line = parse_record(json.dumps(data))
        assert line.record is not None or line.problems
        place.clear()
        place.update(before)


@settings(deadline=None)
@given(st.text(), st.floats(0, 1))
def test_the_linter_takes_any_text(text: str, intensity: float) -> None:
    assert sentence_count(text) == len(sentences(text)) >= 0
    assert 0 <= emoji_count(text) <= len(text)
    assert isinstance(has_question(text), bool)
    assert isinstance(formal_endings(text), list)
    codes = [problem.code for problem in lint_reply(text, intensity)]
    # each rule reports at most once, in the list's order
    assert codes == [code for code in RULES if code in codes]
    blood_types_named(text)


@given(records)
def test_a_record_is_its_own_duplicate(record: TrainingRecord) -> None:
    assert near_fingerprint(record) == near_fingerprint(record.model_copy()) > 0
