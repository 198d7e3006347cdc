"""Check the documents against the code."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import click
import pytest
from conftest import REPOSITORY, load_tool

from entrypoint.cli import cli
from lora_trainer.config import ALL_LINEAR, MemoryConfig, TrainingConfig, config_table, setting_names
from lora_trainer.data.jsonl import Line, parse_record
from lora_trainer.errors import ExitCode, HardwareError
from lora_trainer.run.identity import run_ingredients
from lora_trainer.train.memory_plan import GIB, MemoryPlan, ModelShape, plan_memory
from lora_trainer.train.tokenization import record_messages

tool: Any = load_tool("config_table")

READMES: Final = ("README.md", "README.ko.md")
MOST_README_BYTES: Final = 12_000
CONFIGURATION: Final = "docs/configuration.md"
TROUBLESHOOTING: Final = "docs/troubleshooting.md"
KUBERNETES: Final = "docs/kubernetes.md"
WITH_EXIT_CODES: Final = (*READMES, TROUBLESHOOTING, "SDS.md")
# all documents of the project, except in folders that git ignores
DOCUMENTS: Final = sorted(
    str(path.relative_to(REPOSITORY))
    for pattern in (
        "*.md",
        "data/**/*.md",
        "lora_trainer/**/*.md",
        "locks/*.md",
        "charts/**/*.md",
        "docs/**/*.md",
        "k8s/*.md",
        "examples/*/*.md",
        "benchmarks/**/*.md",
    )
    for path in REPOSITORY.glob(pattern)
)
QWEN_7B: Final = ModelShape(
    layers=28,
    hidden=3584,
    intermediate=18944,
    attention_heads=28,
    key_value_heads=4,
    vocabulary=152064,
    tied_embeddings=False,
    positions=32768,
)


def document(name: str) -> str:
    path: Path = REPOSITORY / name
    return path.read_text(encoding="utf-8")


def marked(name: str, marker: str) -> str:
    """Return the text between `<!-- marker:begin -->` and `<!-- marker:end -->`."""
    (found,) = re.findall(f"<!-- {marker}:begin -->\n(.*?)<!-- {marker}:end -->", document(name), re.DOTALL)
    return str(found)


def rows(name: str, marker: str) -> list[list[str]]:
    """Return the cells of a marked table without its header. A cell that is a single code span loses its backticks."""
    lines = marked(name, marker).strip().splitlines()
    assert set(lines[1]) <= set("|- "), f"{name}: {marker} is not a table"
    cells = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:])
    return [[re.sub("^`([^`]*)`$", r"\1", cell) for cell in row] for row in cells]


def sources() -> Iterator[ast.Module]:
    for package in ("entrypoint", "lora_trainer"):
        for path in (REPOSITORY / package).rglob("*.py"):
            yield ast.parse(path.read_text(encoding="utf-8"))


def calls() -> Iterator[ast.Call]:
    for module in sources():
        yield from (node for node in ast.walk(module) if isinstance(node, ast.Call))


def words(node: ast.AST) -> set[str]:
    """Return the snake_case string constants in `node`."""
    constants = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
    return {value for value in constants if isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_]*", value)}


# --- configuration ---------------------------------------------------------------------------------------


def test_configuration_table_is_the_generated_one() -> None:
    text = document(CONFIGURATION)
    assert tool.with_table(text, CONFIGURATION) == text, "run: python tools/config_table.py --write"


def test_every_setting_is_documented() -> None:
    assert {cells[0] for cells in rows(CONFIGURATION, "config")} == set(setting_names())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_settings_in_the_documents_exist(name: str) -> None:
    settings = set(setting_names())
    sections = {setting.partition(".")[0] for setting in settings if "." in setting}
    for setting in re.findall(r"--set '?([a-z]+\.[a-z_]+)=", document(name)):
        assert setting in settings or setting.partition(".")[0] not in sections, setting


def test_the_table_tool_refuses_a_file_without_its_markers() -> None:
    with pytest.raises(ValueError, match=r"other\.md: expected one"):
        tool.with_table("no markers here", "other.md")


def test_defaults_in_the_specification_are_the_codes() -> None:
    described = {setting: default for setting, default, _ in rows("SDS.md", "parameters")}
    decide_the_weights = {
        setting: default
        for setting, default, _, _ in config_table()
        if setting.startswith(("lora.", "training.")) or setting in ("base.model", "base.revision")
    }
    assert described == decide_the_weights


def test_all_seven_are_named() -> None:
    (why,) = (why for setting, _, why in rows("SDS.md", "parameters") if setting == "lora.target_modules")
    assert why.startswith(", ".join(module.removesuffix("_proj") for module in ALL_LINEAR))


def test_ingredients_of_the_run_id() -> None:
    (body,) = ast.parse(inspect.getsource(run_ingredients)).body
    returned = next(node.value for node in ast.walk(body) if isinstance(node, ast.Return))
    assert isinstance(returned, ast.Dict)
    in_code = {key.value for key in returned.keys if isinstance(key, ast.Constant)}
    described = {name for cells in rows("SDS.md", "ingredients") for name in re.findall(r"\w+", cells[0])}
    assert described == in_code


def test_memory_rule() -> None:
    for recomputation, tokens, estimate_gib, free_gib in rows("SDS.md", "memory"):
        memory = MemoryConfig(gradient_checkpointing="off" if recomputation == "no" else "unsloth", micro_batch_tokens=int(tokens))

        def plan(gib: float, memory: MemoryConfig = memory) -> MemoryPlan:
            return plan_memory(memory, TrainingConfig(), QWEN_7B, int(gib * GIB), 200, "unsloth")

        assert plan(80).estimated_peak_gib == float(estimate_gib)
        automatic = plan(float(free_gib) + 0.05, MemoryConfig())
        assert (automatic.gradient_checkpointing, automatic.micro_batch_tokens) == (memory.gradient_checkpointing, int(tokens))
        try:
            less = plan(float(free_gib) - 0.1, MemoryConfig())
        except HardwareError:
            assert tokens == "1024"
        else:
            assert (less.gradient_checkpointing, less.micro_batch_tokens) != (memory.gradient_checkpointing, int(tokens))
    assert len(rows("SDS.md", "memory")) == 6


# --- exit codes, problems, vocabularies, events ----------------------------------------------------------


@pytest.mark.parametrize("name", WITH_EXIT_CODES)
def test_exit_codes(name: str) -> None:
    described = {int(code): title for code, title, *_ in rows(name, "exit-codes")}
    assert described == {int(code): code.name.lower() for code in ExitCode}


@pytest.mark.parametrize(
    ("name", "may", "must_not"),
    [(name, "가능", "불가") if name == "README.ko.md" else (name, "may help", "no") for name in WITH_EXIT_CODES],
)
def test_exit_codes_say_what_help_says_of_a_retry(name: str, may: str, must_not: str) -> None:
    said = dict(
        re.findall(r"^ {2,}(\d+) .*?(may be retried|must not be retried)?$", inspect.cleandoc(cli.help or ""), re.MULTILINE)
    )
    expected = {"may be retried": may, "must not be retried": must_not, "": ""}
    assert {code: cells[-1] for code, *cells in rows(name, "exit-codes")} == {code: expected[retry] for code, retry in said.items()}


def test_problem_codes() -> None:
    in_code: dict[str, set[str]] = {"error": set(), "warning": set()}
    for call in calls():
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        if name in ("RecordError", "kind"):
            in_code["error"] |= words(call.args[0])
        elif name == "_warning":
            in_code["warning"] |= words(call.args[1])
        elif name == "Problem" and "WARNING" in ast.dump(call.args[2]):
            in_code["warning"] |= words(call.args[3])
    described = {severity: {code for code, found, _ in rows("SDS.md", "problems") if found == severity} for severity in in_code}
    assert described == in_code
    assert min(map(len, in_code.values())) > 5
    fixed = [code for cells in rows("docs/data-format.md", "fixes") for code in cells[0].replace("`", "").split()]
    assert sorted(fixed) == sorted(in_code["error"] | in_code["warning"])


def test_log_events() -> None:
    in_code = {"library_message"}
    for call in calls():
        is_log = isinstance(call.func, ast.IfExp) or (
            isinstance(call.func, ast.Attribute) and call.func.attr in ("debug", "info", "warning", "error")
        )
        if is_log and call.args and isinstance(call.args[0], ast.Constant):
            in_code |= words(call.args[0])
    assert {cells[0] for cells in rows("SDS.md", "events")} == in_code
    assert len(in_code) > 10


def test_fields_of_log_events() -> None:
    described = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", marked("SDS.md", "events"), re.MULTILINE))
    for call in calls():
        if isinstance(call.func, ast.Attribute) and call.args and isinstance(call.args[0], ast.Constant):
            event = call.args[0].value
            if event in described and call.func.attr in ("debug", "info", "warning", "error"):
                fields = {keyword.arg for keyword in call.keywords if keyword.arg}
                assert fields <= set(re.findall(r"`(\w+)`", described[event])), event


def test_sample_prompt() -> None:
    line: Line = parse_record(re.findall(r"```json\n(\{\"instruction.*?)\n```", document("SDS.md"))[0])
    assert line.record is not None, line.problems
    system, user = record_messages(line.record)
    prompt = marked("SDS.md", "prompt")
    assert f"<|im_start|>system\n{system['content']}<|im_end|>\n<|im_start|>user\n{user['content']}<|im_end|>\n" in prompt


@pytest.mark.parametrize("name", ["docs/data-format.md", "data/README.md", "SDS.md"])
def test_sample_record_is_one(name: str) -> None:
    (sample,) = re.findall(r"```json\n(\{\"instruction.*?)\n```", document(name))
    assert parse_record(sample).record is not None


# --- commands, messages, targets, links ------------------------------------------------------------------


def test_every_command_and_option_is_documented() -> None:
    lines = [line for line in document(CONFIGURATION).splitlines() if line.startswith("| `lora-trainer ")]
    by_command = {line.split("`")[1].split()[1]: line for line in lines}
    assert set(by_command) == set(cli.commands)
    run_options = option_names(cli.commands["run"])
    for command_name, command in cli.commands.items():
        line = by_command[command_name]
        inherited = run_options - {"--fresh"} if "the settings options of `run`" in line else set()
        assert set(re.findall(r"`(--?[a-z_-]+)`", line)) | inherited == option_names(command), command_name


def option_names(command: click.Command) -> set[str]:
    return {option for parameter in command.params if isinstance(parameter, click.Option) for option in parameter.opts}


@pytest.mark.parametrize("name", [*READMES, *(name for name in DOCUMENTS if name.startswith(("docs/", "k8s/", "data/")))])
def test_commands_in_the_documents_exist(name: str) -> None:
    """Every `lora-trainer COMMAND --option` in the text names an existing command and its options."""
    text = document(name).replace("\\\n", " ")
    for command, arguments in re.findall(r"lora-trainer ([a-z][a-z-]*)((?: [^\n`#]*)?)", text):
        options = set(re.findall(r"(?<=\s)--[a-z_-]+", arguments))
        # without options, the match may be prose about the project or an image
        if command in cli.commands or options:
            assert options <= option_names(cli.commands[command]), command


def test_troubleshooting_quotes_real_messages() -> None:
    quoted = rows(TROUBLESHOOTING, "troubleshooting")
    for message, code, _ in quoted:
        assert any(message in literal for literal in literals()), message
        assert code == "–" or int(code) in set(ExitCode)
    assert len(quoted) > 30


@cache
def literals() -> frozenset[str]:
    """Return all string constants of the code."""
    constants = (part.value for module in sources() for part in ast.walk(module) if isinstance(part, ast.Constant))
    return frozenset(value for value in constants if isinstance(value, str))


# --- READMEs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READMES)
def test_a_readme_is_short(name: str) -> None:
    assert len(document(name).encode()) <= MOST_README_BYTES


def commands(name: str) -> list[str]:
    """Return the commands in the code blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", document(name), re.DOTALL)
    lines = (re.sub(r"\s*(?:^|\s)#.*", "", line) for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [" ".join(line.split()) for line in lines if line]


def test_both_readmes_have_the_same_commands_and_values() -> None:
    english, korean = READMES
    assert commands(english) == commands(korean)
    assert len(commands(english)) > 8

    def values(name: str) -> list[str]:
        return re.findall(r"```(?:yaml|json)\n(.*?)```", document(name), re.DOTALL)

    assert values(english) == values(korean)
    assert values(english)[-1] in document(KUBERNETES), "mine.yaml"


def test_both_readmes_link_to_the_same_pages() -> None:
    def targets(name: str) -> set[str]:
        return set(re.findall(r"\]\(([^)\s]+)\)", document(name))) - set(READMES)

    english, korean = READMES
    assert targets(english) == targets(korean)
    pages = {name for name in DOCUMENTS if re.fullmatch(r"docs/[a-z-]+\.md", name)}
    assert pages <= targets(english)


def test_every_document_begins_helm_with_the_same_command() -> None:
    first = {
        name: next(command for command in commands(name) if command.startswith("helm "))
        for name in (*READMES, KUBERNETES, "k8s/README.md", "charts/persona-train/README.md")
    }
    assert len(set(first.values())) == 1, first
    command = next(iter(first.values()))
    assert command.startswith("helm install persona-train charts/persona-train --namespace personas --values mine.yaml")


# --- make targets and links ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    in_code = re.findall(r"^make ((?:[a-z0-9-]+ ?)+)|`make ([a-z][a-z0-9 -]*)", document(name), re.MULTILINE)
    used = {target for found in in_code for text in found for target in text.split()}
    assert used <= targets


def anchors(text: str) -> set[str]:
    """Return the ids that GitHub generates for headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_resolve(name: str) -> None:
    text = re.sub(r"```.*?```", "", document(name), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        found: Path = (REPOSITORY / name).parent / path if path else REPOSITORY / name
        assert found.exists(), f"{name}: {target}"
        assert REPOSITORY in (found.resolve(), *found.resolve().parents), f"{name}: {target} leaves the project"
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), f"{name}: {target}"


def test_the_documents_are_there() -> None:
    expected = {"README.md", "README.ko.md", "SDS.md", "ROADMAP.md", "CHANGELOG.md", "CONTRIBUTING.md", "data/README.md"}
    assert expected <= set(DOCUMENTS)
    assert "Apache License" in document("LICENSE")


# --- docs/kubernetes.md ----------------------------------------------------------------------------------
# tests/chart/test_kubernetes_page.py runs its values and its helm commands through Helm


def tables(name: str) -> Iterator[list[str]]:
    """Yield the cells of each row of each table."""
    for line in document(name).splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_exit_codes_of_the_cluster_page_are_the_codes() -> None:
    text = document(KUBERNETES)
    for code in re.findall(r"\bexit (\d+)", text):
        assert int(code) in set(ExitCode), code
    (never,) = (cells[0] for cells in tables(KUBERNETES) if "`PodFailurePolicy`" in cells[-1])
    assert {int(code) for code in re.findall(r"\d+", never)} == {
        ExitCode.CONFIG, ExitCode.DATA, ExitCode.GATE, ExitCode.HARDWARE, ExitCode.DIVERGED,
    }  # fmt: skip


def test_messages_of_the_cluster_page_are_the_jobs_own() -> None:
    quoted = [match[1] for cells in tables(KUBERNETES) if (match := re.match(r"exit \d, `([^`]+)`", cells[0]))]
    assert len(quoted) >= 4
    for message in quoted:
        assert any(message in literal for literal in literals()), message


def test_events_of_the_cluster_page_are_logged() -> None:
    events = {cells[0] for cells in rows("SDS.md", "events")}
    # find code spans that consist of one name with an underscore
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", document(KUBERNETES)))
    fields = {"exit_code", "eta_s"}
    assert named - fields <= events
    assert len(named & events) > 12


def test_seconds_of_the_cluster_page_were_measured() -> None:
    """The numbers in the page's cost table match the benchmark results that the page names."""

    def result(name: str) -> Any:
        return json.loads(document(f"benchmarks/results/{name}"))

    run, evaluation = (
        result("run-7b-defaults-h200.json"),
        result("evaluation-speed-h100.json")["cases"]["unsloth"]["replies"]["120"],
    )
    (steps,) = (
        case["cases"]["throughput"] for case in result("checkpoint-cost-h200.json")["measurements"] if "throughput" in case["cases"]
    )
    in_table = [(cells[0], float(cells[1])) for cells in tables(KUBERNETES) if re.fullmatch(r"\d+\.\d+", cells[1])]
    assert [seconds for _, seconds in in_table] == [
        round(run["timings_s"]["import"], 1),
        round(run["timings_s"]["identify"], 1),
        round(run["timings_s"]["load"], 1),
        round(max(steps["seconds_with"]) / steps["block_steps"], 2),
        round(evaluation["adapter_generate_s"], 1),
        round(evaluation["base_generate_s"], 1),
        4.0,
    ]
    assert "ended after 4.0 s, already done" in run["what"]
    # adapter and base each write 480 replies greedily and 480 sampled
    assert round(8 * (evaluation["adapter_generate_s"] + evaluation["base_generate_s"])) == 145
