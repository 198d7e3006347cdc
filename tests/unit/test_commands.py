"""Check every command that the documents, the help texts and the messages show, as far as a machine without GPU and cluster can.

The project's own programs check what they take: Click parses `lora-trainer` and its settings are settled, `make -n` expands
targets, scripts list their options. `ONLY_PARSED` names the programs that are not started here at all, and why.
`tests/e2e/test_documented_commands.py` runs the commands of the documents in their order;
`tests/chart/test_kubernetes_page.py` renders those of Helm.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import click
import pytest
from documented import Command, documented

from entrypoint.cli import cli
from entrypoint.options import given_settings
from lora_trainer import __version__
from lora_trainer.config import BaseModelConfig, setting_names
from lora_trainer.config_sources import settle_each
from lora_trainer.signals import Interruption

REPOSITORY: Final = Path(__file__).resolve().parents[2]
PROJECT: Final[dict[str, Any]] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
ONLY_PARSED: Final = {
    ".ci/run": "installs everything from scratch",
    "aws": "needs an account",
    "cosign": "needs a published release",
    "docker": "needs an engine and the image",
    "helm": "needs a cluster; tests/chart/test_kubernetes_page.py renders what it installs",
    "kubectl": "needs a cluster",
    "mc": "needs a MinIO",
    "nvidia-smi": "needs a GPU",
    "pip": "needs an index",
    "poetry": "needs an index",
    "pre-commit": "needs an index",
    "uv": "needs an index",
    "vllm": "needs a GPU",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like the checkout of a reader who has followed the documents: with files of their own."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in REPOSITORY.iterdir():
        if not path.name.startswith(".") or path.name == ".ci":
            (folder / path.name).symlink_to(path)
    (folder / "run.yaml").write_text("lora: {r: 8}\n", encoding="utf-8")
    return folder


# --- lora-trainer ----------------------------------------------------------------------------------------


def check_lora_trainer(command: Command) -> None:
    """Parse with Click, and settle the settings that the command line gives."""
    name, *arguments = command.words[1:] or ("--help",)
    if name in ("--help", "--version"):
        return
    assert name in cli.commands, f"no such command: {name}"
    if command.is_mention:
        return
    found = cli.commands[name]
    try:
        # a parent, because a command keeps the names of its help option from the first context that it is given
        parent = click.Context(cli, **cli.context_settings)
        context = found.make_context(name, arguments, parent=parent, obj=Interruption())
    except click.exceptions.Exit:
        # --help ends the parsing
        return
    given = dict(context.params)
    if "config_file" not in given:
        return
    config_file, overrides = given.pop("config_file"), given.pop("overrides")
    # the output of a command for data is none of the run's settings
    of_data = name in ("convert", "generate", "validate")
    settings = {} if of_data else {key: value for key, value in given.items() if key.replace("__", ".") in setting_names()}
    assert settle_each(given_settings(settings, overrides), config_file=config_file, fallback={"blood_type": "A"})


# --- make, scripts ---------------------------------------------------------------------------------------


def check_make(command: Command) -> None:
    make = shutil.which("make")
    assert make
    options = ["--dry-run", "--no-print-directory"]
    done = subprocess.run([make, *options, *command.words[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@cache
def help_of(*program: str) -> str:
    done = subprocess.run(
        [sys.executable, *program, "--help"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_python(command: Command) -> None:
    """Find the script, and each option in its help. A script without a command line of its own only has to exist."""
    words = command.words[1:]
    program = words[:2] if words[0] == "-m" else words[:1]
    arguments = words[len(program) :]
    if program == ("-m", "pytest"):
        assert all((REPOSITORY / path).exists() for path in arguments)
        return
    path = REPOSITORY / (f"{program[1].replace('.', '/')}.py" if program[0] == "-m" else program[0])
    assert path.is_file(), path
    if "argparse" in path.read_text(encoding="utf-8"):
        for option in (word for word in arguments if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_of(*program)), option


def check_script(command: Command) -> None:
    assert (REPOSITORY / command.program).is_file()
    if command.program.endswith(".py"):
        check_python(Command(command.where, command.text, ("python", *command.words), command.is_mention))


def check_ci(command: Command) -> None:
    stages = subprocess.run([REPOSITORY / ".ci" / "run", "--list"], capture_output=True, text=True, check=True).stdout.split()
    assert set(command.words[1:]) <= set(stages)


# --- installers ------------------------------------------------------------------------------------------


def check_installer(command: Command) -> None:
    """Find extras, groups and files that pip, poetry or uv would install."""
    extras, groups = set(PROJECT["project"]["optional-dependencies"]), set(PROJECT["dependency-groups"])
    words = list(command.words[2:])
    for at, word in enumerate(words):
        if match := re.fullmatch(r"(?:\.|lora-trainer)\[([\w,]+)\]", word):
            assert set(match[1].split(",")) <= extras
        before = words[at - 1] if at else ""
        if before in ("--extra", "-E"):
            assert word in extras
        elif before in ("--group", "--without"):
            assert word in groups
        elif before in ("-r", "-c"):
            assert (REPOSITORY / word).is_file()
    known = {
        "pip": {"-c", "-e", "-r", "--group", "--no-deps", "--require-hashes"},
        "poetry": {"--without", "-E"},
        "uv": {"--extra"},
    }[command.program]
    assert {word for word in words if word.startswith("-")} <= known
    assert command.words[1] in ("install", "sync")


# --- programs that are only parsed -----------------------------------------------------------------------


def check_aws(command: Command) -> None:
    """Check operation and parameters against botocore's model, and that local files exist."""
    if command.is_mention:
        return
    service, operation, *arguments = command.words[1:]
    options = {word for word in arguments if word.startswith("--")}
    if service == "s3":
        assert options <= {"--recursive", "--exclude", "--include"}
    elif service != "sso":
        botocore_session: Any = pytest.importorskip("botocore.session")
        model = botocore_session.get_session().get_service_model(service)
        members = model.operation_model("".join(part.title() for part in operation.split("-"))).input_shape.members
        assert {option.removeprefix("--").replace("-", "") for option in options} <= {name.lower() for name in members}
    for word in arguments:
        if word.startswith("file://"):
            json.loads((REPOSITORY / word.removeprefix("file://")).read_text(encoding="utf-8"))


def check_kubectl(command: Command) -> None:
    """Check that applied files and folders exist; `tests/chart` checks names, labels and namespaces."""
    words = command.words[1:]
    for option, value in itertools.pairwise(words):
        if option == "-k":
            assert (REPOSITORY / value / "kustomization.yaml").is_file()
        elif option == "-f" and "apply" in words:
            assert (REPOSITORY / value).is_file()
    verb = next((word for at, word in enumerate(words) if not word.startswith("-") and words[at - 1] != "-n"), "")
    assert verb in ("apply", "create", "delete", "describe", "exec", "get", "logs")


def check_helm(command: Command) -> None:
    words = command.words[1:]
    assert words[0] in ("get", "install", "lint", "template", "test", "uninstall", "upgrade")
    charts = [word for word in words if word.startswith("charts/")]
    assert all((REPOSITORY / chart / "Chart.yaml").is_file() for chart in charts)
    known = {"--install", "--namespace", "--set", "--set-string", "--values"}
    assert {word for word in words if word.startswith("-")} <= known


def check_mc(command: Command) -> None:
    for word in command.words[1:]:
        if word.startswith(("k8s/", "data/")):
            assert (REPOSITORY / word).is_file()


def check_docker(command: Command) -> None:
    """Parse what follows the image as the job's arguments. The image has the checkout's files in /opt/lora-trainer."""
    words = command.words[1:]
    at = next((at for at, word in enumerate(words) if word == "IMAGE" or word.startswith("localhost/lora-trainer:")), None)
    if at is not None:
        arguments = [word.replace("/opt/lora-trainer/", "") for word in words[at + 1 :]]
        check_lora_trainer(Command(command.where, command.text, ("lora-trainer", *arguments), is_mention=False))


def check_cosign(command: Command) -> None:
    """Check that the identity is the one of the workflow that signs, and the version the project's."""
    if command.is_mention:
        return
    words = command.words
    assert words[2].partition(":")[2] == __version__
    identity = words[words.index("--certificate-identity-regexp") + 1]
    assert (REPOSITORY / ".github" / "workflows" / "release.yml").is_file()
    signed_by = f"https://github.com/nnovatecoder/lora-trainer/.github/workflows/release.yml@refs/tags/v{__version__}"
    assert re.search(identity, signed_by)


def check_vllm(command: Command) -> None:
    words = command.words
    base = BaseModelConfig()
    assert words[1:5] == ("serve", base.model, "--revision", base.revision)
    options = {word for word in words if word.startswith("--")}
    assert options == {"--revision", "--enable-lora", "--max-lora-rank", "--lora-modules"}


def check_exists(_: Command) -> None:
    """Nothing is left to check: the shell's own tools, and programs without arguments of ours."""


CHECKS: Final[dict[str, Callable[[Command], None]]] = {
    ".ci/run": check_ci,
    "aws": check_aws,
    "cosign": check_cosign,
    "docker": check_docker,
    "cat": check_exists,
    "echo": check_exists,
    "head": check_exists,
    "helm": check_helm,
    "kubectl": check_kubectl,
    "lora-trainer": check_lora_trainer,
    "make": check_make,
    "mc": check_mc,
    "mkdir": check_exists,
    "nvidia-smi": check_exists,
    "pip": check_installer,
    "poetry": check_installer,
    "pre-commit": check_exists,
    "python": check_python,
    "tools/build_image.sh": check_script,
    "tools/release_notes.py": check_script,
    "uv": check_installer,
    "vllm": check_vllm,
}


@pytest.mark.parametrize("program", sorted({command.program for command in documented()}))
def test_commands_are_valid_as_they_stand(program: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert program in CHECKS, f"{program}: no check; expected one of {', '.join(CHECKS)}"
    monkeypatch.chdir(checkout)
    problems = []
    for command in documented():
        if command.program == program:
            try:
                CHECKS[program](command)
            except Exception as error:
                problems.append(f"{command.where}: {' '.join(command.words)}: {type(error).__name__}: {error}")
    assert not problems, "\n".join(problems)
