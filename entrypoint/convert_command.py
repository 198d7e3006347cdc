"""The command `convert`: turn a file in another format into JSONL that `validate` accepts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

import click

from entrypoint import terminal
from entrypoint.data_inputs import local_input
from entrypoint.options import Intensity, LanguageCommand, config_option, given_settings, language_option, set_option
from lora_trainer.config_sources import settle_each
from lora_trainer.errors import ConfigError, ExitCode
from lora_trainer.escaping import one_line
from lora_trainer.messages import Message, counted, marked, speaker
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling, parse_blood_types
from lora_trainer.store.keys import local_file

_SHOWN_PROBLEMS: Final = 50
_Word = TypeVar("_Word", Feeling, Expression)


@click.command(cls=LanguageCommand)
@click.argument("source", metavar="INPUT")
@click.option("-o", "--output", default="-", show_default=True, metavar="FILE", help="JSONL file to write; - is standard output.")
@click.option("--force", is_flag=True, help="Replace an existing FILE.")
@click.option(
    "--blood-type",
    "--blood_type",
    "blood_type",
    metavar="TYPE",
    help="Persona whose instruction records without one get. Default: from INPUT's name. Other personas' rows are left out.",
)
@click.option("--instruction", metavar="TEXT", help="Instruction for records without one, instead of the persona's own.")
@click.option("--feeling", metavar="NAME", help="What the friend feels in records that don't say it.")
@click.option("--intensity", type=Intensity(), metavar="X", help="How strongly, 0 to 1, in records that don't say it.")
@click.option("--face", metavar="NAME", help="What the friend's face shows in records that don't say it.")
@click.option(
    "--intensity-max",
    type=click.Choice(["1", "5", "10", "100"]),
    help="How INPUT writes the strongest feeling. Default: judged by its numbers.",
)
@click.option("--split-turns", is_flag=True, help="Make a record of each answer of a longer conversation.")
@click.option("--sheet", metavar="NAME", help="Sheet of an XLSX file, if it has several.")
@config_option
@set_option("limits.text_characters=50000")
@language_option
def convert(
    source: str,
    output: str,
    force: bool,
    blood_type: str | None,
    instruction: str | None,
    feeling: str | None,
    intensity: float | None,
    face: str | None,
    intensity_max: str | None,
    split_turns: bool,
    sheet: str | None,
    config_file: Path | None,
    overrides: Sequence[str],
    language: str,
) -> None:
    """Turn a file in another format into JSONL for 'run'.

    \b
    INPUT is a local path, file://, s3://, a pipe, or - for standard input. Its content tells the format:
      JSON       an array, pretty-printed or concatenated objects, one object around all, Python dictionaries
      chats      OpenAI messages, ShareGPT, Gemini; also Alpaca, prompt and completion
      tables     CSV, TSV and XLSX with English or Korean column names (입력, 답변, 감정, 감정 강도, 표정, ...)
      encodings  CP949 (EUC-KR), UTF-16, UTF-32
    Labels may be Korean (기쁨, 활짝 웃음), intensities percentages (80, 80%) or words (강함, 보통, 약함).
    What a record lacks is not invented: --feeling, --intensity, --face and --instruction supply it.

    \b
    Examples:
      lora-trainer convert records.json --output train_data_type_A.jsonl
      lora-trainer convert 대화.xlsx --blood-type A --output train_data_type_A.jsonl
      lora-trainer convert chats.jsonl --blood-type B --feeling neutral --intensity 0.5 --face neutral > b.jsonl

    Writes what can be converted, lists on standard error what cannot, and then exits with 3.
    """
    from lora_trainer.data.convert import Defaults, convert_file
    from lora_trainer.data.convert_columns import face_of, feeling_of
    from lora_trainer.data.validation import type_in_name
    from lora_trainer.store.retry import RetryBudget

    say = speaker(language)
    config = settle_each(given_settings({}, overrides), config_file=config_file, fallback={"blood_type": "A"})[0]
    persona = _one_blood_type(blood_type)
    named_feeling = _named("--feeling", feeling, Feeling, feeling_of)
    named_face = _named("--face", face, Expression, face_of)
    target = None if output == "-" else _target(output, is_forced=force)
    with tempfile.TemporaryDirectory() as scratch:
        path = local_input(
            source,
            Path(scratch),
            RetryBudget(config.storage),
            max_bytes=config.limits.decompressed_bytes,
            expected=Message("a file to convert"),
        )
        defaults = Defaults(
            instruction=instruction,
            blood_type=persona or type_in_name(path),
            feeling=named_feeling,
            intensity=intensity,
            face=named_face,
            intensity_max=int(intensity_max) if intensity_max else None,
            split_turns=split_turns,
            sheet=sheet,
        )
        name = say(Message("standard input")) if source == "-" else source
        conversion = convert_file(path, defaults, config.limits, name=name)
    for note in conversion.notes:
        click.echo(one_line(say(Message("note: {file}: {note}", file=name, note=marked(note)))), err=True)
    lines = conversion.problem_lines(name)
    for line in lines[:_SHOWN_PROBLEMS]:
        click.echo(one_line(say(Message("error: {problem}", problem=marked(line)))), err=True)
    if (hidden := len(lines) - _SHOWN_PROBLEMS) > 0:
        more = counted(
            hidden, "error: {file}: {count:,} more problem not shown", "error: {file}: {count:,} more problems not shown", file=name
        )
        click.echo(say(more), err=True)
    if conversion.records:
        _write((record.to_json() for record in conversion.records), target)
    click.echo(say(_end(len(conversion.records), conversion.failed, target)), err=True)
    if conversion.failed:
        raise click.exceptions.Exit(ExitCode.DATA)


def _end(records: int, failed: int, target: Path | None) -> Message:
    """Return what was written, and what to do next."""
    if not records:
        return Message("0 records written, {failed:,} not converted", failed=failed)
    if target is None:
        return counted(
            records,
            "{count:,} record written to standard output, {failed:,} not converted",
            "{count:,} records written to standard output, {failed:,} not converted",
            failed=failed,
        )
    return counted(
        records,
        "{count:,} record written to {file}, {failed:,} not converted; now run: lora-trainer validate {file}",
        "{count:,} records written to {file}, {failed:,} not converted; now run: lora-trainer validate {file}",
        failed=failed,
        file=target,
    )


def _one_blood_type(text: str | None) -> BloodType | None:
    """Parse `--blood-type`. Raises `ConfigError` for an unknown name, or several."""
    if text is None:
        return None
    try:
        (found,) = parse_blood_types(text)
    except ValueError:
        raise ConfigError(Message("--blood-type: got {text!r:.100}, expected A, B, O or AB", text=text)) from None
    return found


def _named(option: str, text: str | None, vocabulary: type[_Word], meaning: Callable[[str], _Word | None]) -> _Word | None:
    """Parse a feeling or a face, in English or Korean. Raises `ConfigError` for an unknown name."""
    if text is None:
        return None
    if (found := meaning(text)) is None:
        raise ConfigError(
            Message("{option}: got {text!r:.100}, expected one of {names}", option=option, text=text, names=", ".join(vocabulary))
        )
    return found


def _target(output: str, *, is_forced: bool) -> Path:
    """Return the path of the output. Raises `ConfigError` for one that must not be written."""
    path = local_file(output)
    if path is None:
        raise ConfigError(
            Message("--output: got {file}, expected a local file; validate it, then copy it to the store", file=output)
        )
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:
        raise ConfigError(_not_writable(output, error.strerror or str(error))) from None
    if is_folder:
        raise ConfigError(Message("--output: got the folder {file}, expected a file such as train_data_type_A.jsonl", file=output))
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise ConfigError(
            Message("--output: got {file}, expected a name that ends in .jsonl, such as train_data_type_A.jsonl", file=output)
        )
    if is_there and not is_forced:
        raise ConfigError(
            Message("--output: {file}: got an existing file, expected none; choose another name or pass --force", file=output)
        )
    return path


def _not_writable(file: Path | str, reason: str) -> Message:
    return Message("--output: {file}: got {reason}, expected a file that can be written", file=file, reason=reason)


def _write(lines: Iterable[str], target: Path | None) -> None:
    """Write the records in UTF-8, whatever the terminal's encoding is; a file appears whole or not at all."""
    if target is None:
        terminal.write_bytes(b"".join(line.encode() + b"\n" for line in lines))
        return
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            for line in lines:
                file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(_not_writable(target, reason)) from None
