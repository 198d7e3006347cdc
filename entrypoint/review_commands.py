"""Commands with which people decide about an adapter: `review` and `promote`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from entrypoint.options import Command, LanguageCommand, LocalPath, language_option
from lora_trainer.errors import ConfigError
from lora_trainer.escaping import one_line

_DEFAULT_PAIRS: Final = 40
_MAX_PAIRS: Final = 1000
_MAX_SEED: Final = 2**53 - 1
"""The largest integer that a browser's JSON keeps exactly."""


@click.command(cls=LanguageCommand)
@click.argument("run", metavar="RUN")
@click.option("--against", metavar="RUN", help="Compare with this run's adapter instead of the base.")
@click.option(
    "--output",
    metavar="FILE",
    help="Where the page goes. s3:// or file://. Default: review-<TYPE>-<run id>.html in the current folder.",
)
@click.option(
    "--count", type=click.IntRange(1, _MAX_PAIRS), default=_DEFAULT_PAIRS, show_default=True, metavar="N", help="Pairs to compare."
)
@click.option(
    "--seed",
    type=click.IntRange(0, _MAX_SEED),
    default=0,
    show_default=True,
    metavar="N",
    help="Draws the pairs and their sides; the same seed gives the same page.",
)
@language_option
def review(run: str, against: str | None, output: str | None, count: int, seed: int, language: str) -> None:
    """Make a page on which a person compares RUN's replies with the base's, without knowing which is which.

    RUN is a published bundle: s3://.../adapters/<TYPE>/<run id>/, file:// or a folder; or one of its later evaluations,
    .../<run id>/evaluations/<gate id>/. The page shows greedy replies to randomly drawn prompts, at most one to each prompt.

    The page is one file that works without a network, by keyboard and on a phone, and keeps its state in the browser. At its end it
    shows whose replies were preferred and offers a JSON file, which 'promote --reviewed' checks and records.

    \b
    Examples:
      lora-trainer review s3://bucket/lora/adapters/A/0123456789abcdef/
      lora-trainer review outputs/adapter_A --against outputs/adapters/A/0123456789abcdef/ --lang ko --output review.html
    """
    from lora_trainer.run.review import make_review_page
    from lora_trainer.store.keys import split_uri
    from lora_trainer.store.opening import open_storage
    from lora_trainer.store.retry import budget_from_environment

    retry_budget = budget_from_environment()
    if output is not None:
        # refuse a mistyped URI before anything is fetched
        split_uri(output)
    made = make_review_page(run, against, seed, count, language, retry_budget)
    target = output or made.file_name
    folder, key = split_uri(target)
    open_storage(folder, retry_budget).write_bytes(key, made.html.encode())
    click.echo(f"page: {target}")
    click.echo(f"{made.pairs} pairs of {made.prompts} prompts, seed {seed}, against {one_line(made.against)}", err=True)
    click.echo(f"when it is reviewed: lora-trainer promote {one_line(run)} --reviewed FILE", err=True)


@click.command(cls=Command)
@click.argument("adapter", metavar="RUN")
@click.option(
    "--reviewed",
    type=LocalPath(dir_okay=False),
    metavar="FILE",
    help="The JSON file of a finished review of RUN. Its counts go into latest.json.",
)
@click.option("--accept-unsafe", is_flag=True, help="Promote although the reviewer marked replies of the adapter as unsafe.")
def promote(adapter: str, reviewed: Path | None, accept_unsafe: bool) -> None:
    """Point latest.json at RUN, whatever its verdict and even if another run is newer.

    RUN is a published bundle: s3://.../adapters/<TYPE>/<run id>/, file:// or a folder. Runs that start later move
    the pointer as usual; runs that started earlier don't move it back.

    --reviewed checks that the file belongs to RUN and answers every pair that its seed draws (exit 2), and refuses RUN if the
    reviewer marked one of the adapter's replies as unsafe (exit 4; with --accept-unsafe it is promoted, and latest.json says
    so). Wins and losses are recorded and decide nothing.

    \b
    Examples:
      lora-trainer promote s3://bucket/lora/adapters/A/0123456789abcdef/
      lora-trainer promote outputs/adapter_A --reviewed review-A-0123456789abcdef-0.json
    """
    from lora_trainer.run.adapter import open_adapter, output_of
    from lora_trainer.run.bundle_files import check_promotable, recorded_scope
    from lora_trainer.run.review import check_review
    from lora_trainer.store.latest import link_newest, promote_latest
    from lora_trainer.store.prefixes import latest_key
    from lora_trainer.store.retry import budget_from_environment

    if accept_unsafe and reviewed is None:
        raise ConfigError("--accept-unsafe: got no review, expected --reviewed FILE as well: only a review marks replies as unsafe")
    opened = open_adapter(adapter, budget_from_environment())
    blood_type, output = opened.blood_type, output_of(opened)
    checked = check_review(opened, reviewed, accept_unsafe=accept_unsafe) if reviewed else None
    check_promotable(opened.storage, opened.manifest)
    covered = recorded_scope(opened.manifest)
    before = promote_latest(output, blood_type, opened.manifest, covered.sense, review=checked.record if checked else None)
    link_newest(output, blood_type, opened.run_id)
    click.echo(f"{output.uri}{latest_key(blood_type)}: names run {opened.run_id} now; before: {one_line(before or 'none')}")
    click.echo(covered.text, err=True)
    if checked:
        click.echo(checked.summary)
