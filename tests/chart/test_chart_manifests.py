"""Render thirty combinations of values with both Helms and check them with Kubernetes schemas, policies and the job itself."""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from chart.chart_helm import CHART, Helm, Manifests, RefusedError, Values, examples, whole
from chart.combinations import COMBINATIONS
from chart.kubernetes_rules import VERSIONS, violations

# podFailurePolicy needs Kubernetes 1.26. kubernetes-validate has schemas for 1.25 and later.
OLDER: Final = ("1.25", "1.26", "1.27", "1.28", "1.29", "1.30", "1.31")


def test_there_are_thirty() -> None:
    assert len(COMBINATIONS) >= 30


def hooks(values: Values) -> str:
    return whole(values)["tests/check-storage.yaml"]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_version_of_kubernetes_knows_every_field(helm: Helm, schemas: None, name: str) -> None:
    import kubernetes_validate

    values = COMBINATIONS[name]
    test_pod = yaml.safe_load(hooks(values))
    for version in (*VERSIONS, *(OLDER if name in examples() else ())):
        text = helm.template(values, kube=f"{version}.0")
        for item in [*Manifests(text).objects, test_pod]:
            assert item["metadata"]["namespace"] == "personas"
            kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_both_helms_give_the_same(helm: Helm, name: str) -> None:
    for kube in ("1.20.2", "1.28.0", "1.37.0"):
        assert helm.template(COMBINATIONS[name], helm="v3", kube=kube) == helm.template(COMBINATIONS[name], helm="v4", kube=kube)


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("version", ["v3", "v4"])
def test_helm_lint_is_strict_and_content(helm: Helm, version: Any, name: str) -> None:
    # The chart of a batch job needs no icon.
    assert helm.lint(COMBINATIONS[name], helm=version) == ["INFO: Chart.yaml: icon is recommended"]


@pytest.mark.parametrize("version", ["v3", "v4"])
def test_helm_lint_refuses_the_bare_defaults(helm: Helm, version: Any) -> None:
    with pytest.raises(RefusedError, match="bloodType"):
        helm.lint({}, helm=version)


# -- Pod Security "restricted" ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMBINATIONS)
def test_pod_security_restricted_admits_it(helm: Helm, name: str) -> None:
    rendered = Manifests(helm.template(COMBINATIONS[name]))
    assert all(account["automountServiceAccountToken"] is False for account in rendered.of_kind("ServiceAccount"))
    for pod in [*rendered.pods, yaml.safe_load(hooks(COMBINATIONS[name]))]:
        assert list(violations(pod)) == []
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["restartPolicy"] == "Never"
        (container,) = spec["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {"cpu", "memory"} <= set(container["resources"]["limits"]) & set(container["resources"]["requests"])
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_the_check_of_the_standard_can_fail() -> None:
    context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True}
    good = {"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}, "volumes": []}
    assert list(violations({"spec": {**good, "containers": [{"name": "x", "securityContext": context}]}})) == []
    bad = {"spec": {**good, "hostNetwork": True, "containers": [{"name": "x", "securityContext": {"runAsUser": 0}}]}}
    assert list(violations(bad)) == [
        "hostNetwork", "x: allowPrivilegeEscalation", "x: capabilities.drop", "x: runAsNonRoot", "x: runAsUser",
    ]  # fmt: skip


# -- checkov --------------------------------------------------------------------------------------------


def test_checkov_has_no_failed_check(helm: Helm, tmp_path: Path) -> None:
    checkov = Path(os.environ.get("CHECKOV", CHART.parents[1] / ".venv-checkov" / "bin" / "checkov"))
    assert checkov.exists(), f"no checkov at {checkov}; make chart-test installs it"
    for number, values in enumerate(COMBINATIONS.values()):
        (tmp_path / f"{number:02}.yaml").write_text(f"{helm.template(values)}\n---\n{hooks(values)}")
    done = subprocess.run(
        [checkov, "--directory", tmp_path, "--config-file", Path(__file__).parent / "checkov.yaml", "--output", "json"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "LOG_LEVEL": "ERROR"},
    )
    report = json.loads(done.stdout)
    failed = [(check["check_id"], check["file_path"]) for check in report["results"]["failed_checks"]]
    # OpenShift assigns the user id, so the chart must not set one there.
    openshift = f"/{list(COMBINATIONS).index('the user of OpenShift'):02}.yaml"
    assert sorted(failed) == [("CKV_K8S_40", openshift)] * 2
    assert report["summary"]["passed"] > 30 * len(COMBINATIONS)
    assert report["summary"]["parsing_errors"] == 0


# -- yamllint -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", examples())
def test_what_is_rendered_is_good_yaml(helm: Helm, name: str) -> None:
    from yamllint import linter
    from yamllint.config import YamlLintConfig

    # Helm writes lists without indentation and never wraps long values.
    config = YamlLintConfig(
        "{extends: default, rules: {line-length: disable, indentation: {indent-sequences: whatever}, braces: disable}}"
    )
    text = helm.template(COMBINATIONS[name])
    assert [str(problem) for problem in linter.run(io.StringIO(text), config) if problem.rule != "new-line-at-end-of-file"] == []


# -- the job itself -------------------------------------------------------------------------------------

_SETTLE: Final = """
import contextlib, io, json, sys
from entrypoint.cli import cli, run_cli
answers = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_cli(["show-config", "--json", *arguments])
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


def settle(arguments: list[list[str]]) -> list[tuple[int, str, str]]:
    """Run `show-config --json` with each of `arguments` in the project's own Python. Return exit codes, outputs and errors."""
    python = Path(os.environ.get("PROJECT_PYTHON", CHART.parents[1] / ".venv" / "bin" / "python"))
    assert python.exists(), f"no environment of the project at {python}: make setup"
    done = subprocess.run(
        [python, "-c", _SETTLE],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        cwd=CHART.parents[1],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(CHART.parents[1])},
        timeout=120,
        check=True,
    )
    return [tuple(answer) for answer in json.loads(done.stdout)]


def test_the_chart_takes_every_default_of_the_job(helm: Helm) -> None:
    ((code, out, _),) = settle([[]])
    assert code == 0
    settings = json.loads(out)
    for name in ("blood_type", "data", "output", "work_dir", "device", "base"):
        # The chart sets these through values of its own.
        del settings[name]
    # Count each section and each setting in it.
    assert sum(len(part) if isinstance(part, dict) else 1 for part in settings.values()) > 50
    rendered = Manifests(helm.template({"bloodType": "A", "config": settings}))
    assert rendered.settings == settings


def test_the_job_takes_what_the_chart_gives_it(helm: Helm, tmp_path: Path) -> None:
    asked: list[list[str]] = []
    expected: list[tuple[str, Values]] = []
    for number, (name, values) in enumerate(COMBINATIONS.items()):
        rendered = Manifests(helm.template(values))
        settings = tmp_path / f"{number}.yaml"
        settings.write_text(rendered.one("ConfigMap")["data"]["config.yaml"])
        containers = [pod["spec"]["containers"][0] for pod in [*rendered.pods, yaml.safe_load(hooks(values))]]
        for container in containers:
            command, *options = container["args"]
            assert command == ("run" if container["name"] == "trainer" else "check-storage")
            asked.append([option.replace("/etc/lora-trainer/config.yaml", str(settings)) for option in options])
            expected.append((name, values.get("config", {})))
    for (name, settings), (code, out, err) in zip(expected, settle(asked), strict=True):
        assert (code, err) == (0, ""), name
        settled = json.loads(out)
        for section, given in settings.items():
            for setting, value in given.items() if isinstance(given, dict) else ():
                assert settled[section][setting] == value, f"{name}: {section}.{setting}"
        assert settled["work_dir"] in ("/job", ".lora-trainer")
