"""Check the workflows: they use existing files and targets and pinned actions, and a release matches its tag."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from conftest import REPOSITORY, load_tool

tool: Any = load_tool("release_notes")
FOLDER: Final = REPOSITORY / ".github" / "workflows"
WORKFLOWS: Final = sorted(FOLDER.glob("*.yml"))
CHANGELOG: Final = """# Changelog

## [Unreleased]

## [1.2.0] - 2026-12-01

### Added

- This.

## [1.1.0]

- That.

[1.2.0]: https://example.com
"""


def scripts(path: Path) -> list[str]:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_action_is_pinned_to_a_commit_with_its_version(path: Path) -> None:
    uses = re.findall(r"uses: (\S+)(.*)", path.read_text(encoding="utf-8"))
    assert uses
    for action, comment in uses:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), action


def test_an_action_has_one_version_everywhere() -> None:
    pins = {pin for path in WORKFLOWS for pin in re.findall(r"uses: (\S+@\S+ # \S+)", path.read_text(encoding="utf-8"))}
    assert len(pins) == len({pin.partition("@")[0] for pin in pins})


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_rights_are_given_to_jobs_and_not_to_workflows(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        assert "contents" in job["permissions"], name
        assert job["timeout-minutes"] <= 180, name
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_make_targets_and_files_that_scripts_name_exist(path: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for script in scripts(path):
        for target in re.findall(r"(?m)^\s*make ([a-z0-9-]+)", script):
            assert re.search(rf"(?m)^{target}:", makefile), target
        for name in re.findall(r"(?<![\w./-])((?:tools|tests|charts|k8s|locks|\.ci)/[\w./-]+)", script):
            assert (REPOSITORY / name).exists(), name


def ci_runs() -> list[dict[str, str]]:
    """Return the combinations of Python and stages in which ci.yml runs .ci/run, as GitHub expands the matrix."""
    matrix = yaml.safe_load((FOLDER / "ci.yml").read_text(encoding="utf-8"))["jobs"]["ci"]["strategy"]["matrix"]
    crossed = [{"python": python, "stages": stages} for python in matrix["python"] for stages in matrix["stages"]]
    return [*crossed, *matrix["include"]]


def test_ci_runs_on_every_python_that_the_project_takes() -> None:
    assert sorted({run["python"] for run in ci_runs()}) == ["3.11", "3.12", "3.13"]
    assert 'requires-python = ">=3.11,<3.14"' in (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")


def test_ci_runs_every_stage_and_those_without_python_once() -> None:
    listed = subprocess.run([REPOSITORY / ".ci" / "run", "--list"], capture_output=True, text=True, check=True)
    versions: dict[str, list[str]] = {stage: [] for stage in listed.stdout.split()}
    for run in ci_runs():
        for stage in run["stages"].split():
            versions[stage].append(run["python"])
    once = {stage for stage, pythons in versions.items() if len(pythons) == 1}
    assert once == {"lint", "data", "chart", "workflows", "image"}
    assert all(pythons == ["3.11", "3.12", "3.13"] for stage, pythons in versions.items() if stage not in once)


def test_an_unknown_stage_is_refused() -> None:
    done = subprocess.run([REPOSITORY / ".ci" / "run", "lint", "tset"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "got the stage 'tset', expected one of: lint typecheck" in done.stderr


def test_slow_tests_run_every_night() -> None:
    workflow = yaml.safe_load((FOLDER / "nightly.yml").read_text(encoding="utf-8"))
    # YAML 1.1 parses the key `on` as true
    assert re.fullmatch(r"\d+ \d+ \* \* \*", workflow[True]["schedule"][0]["cron"])
    assert {"make test-slow", "make poetry-check"} <= set(scripts(FOLDER / "nightly.yml"))


def test_a_release_is_tagged_where_the_chart_looks_for_it() -> None:
    values = yaml.safe_load((REPOSITORY / "charts" / "persona-train" / "values.yaml").read_text(encoding="utf-8"))
    (line,) = re.findall(r"sed -n '(.*)' charts/persona-train/values.yaml", (FOLDER / "release.yml").read_text(encoding="utf-8"))
    assert line == r"s/^  repository: //p"
    text = (REPOSITORY / "charts" / "persona-train" / "values.yaml").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^  repository: (.*)$", text) == [values["image"]["repository"]]
    # the chart's CPU example uses the tag suffix of the CPU image
    example = yaml.safe_load((REPOSITORY / "charts/persona-train/ci/cpu-values.yaml").read_text(encoding="utf-8"))
    suffixes = [entry["suffix"] for entry in _matrix("release.yml", "image")]
    assert suffixes == ["", "-cpu"]
    assert example["image"]["tag"].endswith("-cpu")


def _matrix(workflow: str, job: str) -> list[dict[str, str]]:
    text = (FOLDER / workflow).read_text(encoding="utf-8")
    return list(yaml.safe_load(text)["jobs"][job]["strategy"]["matrix"]["include"])


# -- the release ----------------------------------------------------------------------------------------


def test_the_section_of_a_version() -> None:
    assert tool.section(CHANGELOG, "1.2.0") == "### Added\n\n- This.\n"
    assert tool.section(CHANGELOG, "1.1.0") == "- That.\n"


@pytest.mark.parametrize("version", ["Unreleased", "1.3.0", "1.2", "1x2.0"])
def test_a_version_without_text_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match="no text below"):
        tool.section(CHANGELOG, version)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "charts" / "persona-train").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    (tmp_path / "charts" / "persona-train" / "Chart.yaml").write_text("version: 1.2.0\nappVersion: 1.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    return tmp_path


def test_a_release_that_is_what_its_tag_says(project: Path) -> None:
    assert tool.problems(project, "v1.2.0") == []


def test_all_that_keeps_a_release_is_said_together(project: Path) -> None:
    assert tool.problems(project, "v1.3.0") == [
        "pyproject.toml: version: got 1.2.0, expected 1.3.0, as the tag has it",
        "Chart.yaml: version: got 1.2.0, expected 1.3.0, as the tag has it",
        "Chart.yaml: appVersion: got 1.2.0, expected 1.3.0, as the tag has it",
        "CHANGELOG.md: no text below '## [1.3.0]'; move what is Unreleased there",
    ]
    assert tool.problems(project, "1.2.0") == ["got the tag 1.2.0, expected one such as v1.2.3"]
