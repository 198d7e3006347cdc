"""Collect the commands that the documents, the help texts and the messages show."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import click

from entrypoint.cli import cli

REPOSITORY: Final = Path(__file__).resolve().parent.parent
PAGES: Final = (
    "README.md", "README.ko.md", "SECURITY.md", "SDS.md", "CONTRIBUTING.md", "ROADMAP.md", "docs/*.md", "docs/adr/*.md", "k8s/*.md",
    "charts/*/README.md", "locks/README.md", "data/*.md", "data/*/*.md", "examples/*/README.md", "tools/*/*/README.md",
    "lora_trainer/**/README.md",
)  # fmt: skip
PROGRAMS: Final = (
    ".ci/run", "aws", "cosign", "docker", "helm", "kubectl", "lora-trainer", "make", "mc", "nvidia-smi", "pip", "poetry", "python",
    "tools/", "uv", "vllm", ".venv/bin/",
)  # fmt: skip
# what a reader fills in, and an example of it
PLACEHOLDERS: Final = {
    "<run id>": "0123456789abcdef",
    "<other>": "fedcba9876543210",
    "<bundle>": "outputs/adapter_A",
    "<release>": "persona-train",
    "RUN...": "RUN",
    "FILE...": "FILE",
    "COMMAND": "run",
    "…": "value",
}


@dataclass(frozen=True)
class Command:
    """A simple command, as its words."""

    where: str
    text: str
    words: tuple[str, ...]
    is_mention: bool
    """Whether prose only names the program or one of its subcommands, without arguments."""

    @property
    def program(self) -> str:
        return self.words[0]


def filled_in(text: str) -> str:
    """Return a command with its placeholders replaced by examples."""
    for placeholder, example in PLACEHOLDERS.items():
        text = text.replace(placeholder, example)
    return text


def simple_commands(line: str) -> Iterator[tuple[str, ...]]:
    """Yield the simple commands of a shell line, without comments, assignments, redirections and `run` wrappers."""
    lexer = shlex.shlex(filled_in(line), posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    redirects = False
    for word in (*lexer, ";"):
        if word in ("&&", "|", ";", "||"):
            if command := unwrapped(words):
                yield command
            words = []
        elif word in (">", ">>", "<"):
            redirects = True
        elif redirects:
            redirects = False
        else:
            words.append(word)


def unwrapped(words: list[str]) -> tuple[str, ...]:
    """Return the program and its arguments, without what only starts them."""
    while words and re.match(r"[A-Z][A-Z0-9_]*=", words[0]):
        words = words[1:]
    if not words or words[0] == "export":
        return ()
    if words[:2] in (["poetry", "run"], ["uv", "run"]):
        words = words[2:]
    if words[:3] == ["python", "-m", "entrypoint"]:
        words = ["lora-trainer", *words[3:]]
    return (words[0].removeprefix(".venv/bin/"), *words[1:])


def in_line(where: str, line: str, *, in_prose: bool) -> Iterator[Command]:
    for words in simple_commands(line):
        yield Command(where, line, words, in_prose and (len(words) <= 2 or line.endswith("…")))


def lines_of(block: str) -> list[str]:
    """Return the lines of a shell block with their continuations joined, without blank and comment lines."""
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.lstrip().startswith("#")]


def pages() -> list[str]:
    return sorted(str(path.relative_to(REPOSITORY)) for pattern in PAGES for path in REPOSITORY.glob(pattern))


@cache
def blocks(page: str) -> tuple[str, ...]:
    """Return the shell blocks of a page."""
    return tuple(re.findall(r"```(?:bash|sh)\n(.*?)```", (REPOSITORY / page).read_text(encoding="utf-8"), re.DOTALL))


def of_pages() -> Iterator[Command]:
    for page in pages():
        for block in blocks(page):
            for line in lines_of(block):
                yield from in_line(page, line, in_prose=False)
        text = re.sub(r"```.*?```", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.DOTALL)
        for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
            span = " ".join(span.replace("\\|", "|").split())
            if span.startswith(PROGRAMS) and " " in span:
                yield from in_line(page, span, in_prose=True)


def of_help() -> Iterator[Command]:
    for name, command in {"": cli, **cli.commands}.items():
        texts = [command.help or "", *(option.help or "" for option in command.params if isinstance(option, click.Option))]
        for text in texts:
            for line in re.findall(r"^\s+((?:echo .*\| )?lora-trainer .*)$", inspect.cleandoc(text), re.MULTILINE):
                yield from in_line(f"lora-trainer {name} --help".replace("  ", " "), line, in_prose=False)
            for span in re.findall(r"'((?:lora-trainer|make|pip install) [^']*)'", text):
                yield from in_line(f"lora-trainer {name} --help".replace("  ", " "), span, in_prose=True)


def of_messages() -> Iterator[Command]:
    """Yield the commands that string literals of the code show. Values that a message fills in are `X`."""
    for package in ("entrypoint", "lora_trainer"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            module = ast.parse(path.read_text(encoding="utf-8"))
            docstrings = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
            for node in ast.walk(module):
                if id(node) in docstrings or not isinstance(node, ast.Constant | ast.JoinedStr):
                    continue
                parts = [node] if isinstance(node, ast.Constant) else node.values
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)
                shown = re.findall(r"['`]((?:lora-trainer|make|aws|helm|kubectl) [^'`]*)['`]", text)
                shown += re.findall(r"pip install '[^']*'", text)
                for command in shown:
                    yield from in_line(str(path.relative_to(REPOSITORY)), command, in_prose=True)


@cache
def documented() -> tuple[Command, ...]:
    """Return every command once for each place that shows it."""
    return tuple(dict.fromkeys((*of_pages(), *of_help(), *of_messages())))
