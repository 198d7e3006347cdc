"""Check docs/kubernetes.md with Helm: its blocks of values, the values that its text mentions, and its helm commands."""

from __future__ import annotations

import itertools
import re
import shlex
from typing import Any, Final

import pytest
import yaml

from chart.chart_helm import CHART, REPOSITORY, Helm, Manifests, Values, examples, merged, nested

PAGES: Final = ("docs/kubernetes.md", "k8s/README.md")
TEXT: Final = {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in PAGES}
DEFAULTS: Final[Values] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
BLOCKS: Final = re.findall(r"```yaml\n# values\n(.*?)```", TEXT["docs/kubernetes.md"], re.DOTALL)
COMMANDS: Final = [
    command.replace("\\\n", " ")
    for name in ("README.md", "README.ko.md", "charts/persona-train/README.md", *PAGES)
    for block in re.findall(r"```bash\n(.*?)```", (REPOSITORY / name).read_text(encoding="utf-8"), re.DOTALL)
    for command in re.findall(r"(?m)^helm (?:install|upgrade)(?:.*\\\n)*.*$", block)
]
# endings of words that contain a dot but are not chart values
FILES: Final = (".yaml", ".md", ".json", ".jsonl", ".html", ".tgz", ".yml", ".py")


def scalar(text: str) -> Any:
    """Parse a value as --set does."""
    return yaml.safe_load(text) if re.fullmatch(r"-?\d+|true|false|null", text) else text


def given_by(command: str) -> Values:
    """Return the values that a command passes with --set and --set-string."""
    words = shlex.split(command)
    values: Values = {}
    for option, text in itertools.pairwise(words):
        if option in ("--set", "--set-string"):
            name, _, value = text.partition("=")
            parsed: Any
            if value.startswith("{"):
                parsed = [scalar(item) for item in value.strip("{}").split(",")]
            else:
                parsed = value if option == "--set-string" else scalar(value)
            values = merged(values, nested(name, parsed))
    return values


def own(values: Values) -> Values:
    """Merge `values` over the first `mine.yaml` of the page."""
    return merged(yaml.safe_load(BLOCKS[0]), values)


def test_there_are_values_and_commands() -> None:
    assert len(BLOCKS) == 3
    assert len(COMMANDS) == 9


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0])
def test_values_are_taken(helm: Helm, block: str) -> None:
    values = yaml.safe_load(block)
    rendered = Manifests(helm.template(merged({"bloodType": "A"}, values)))
    assert rendered.jobs
    # the values have an effect
    assert rendered.text != helm.template({"bloodType": "A"})


@pytest.mark.parametrize("command", COMMANDS)
def test_helm_commands_are_taken(helm: Helm, command: str) -> None:
    words = shlex.split(command)
    # the page's IRSA role trusts only the service account of a release called persona-train
    assert "persona-train" in words
    assert words[words.index("--namespace") + 1] == "personas"
    rendered = Manifests(helm.template(own(given_by(command))))
    assert rendered.jobs


@pytest.mark.parametrize("options", re.findall(r"`((?:--set(?:-string)? [^ `]+='?[^`]*?)+)`", TEXT["docs/kubernetes.md"]), ids=str)
def test_options_in_the_text_are_taken(helm: Helm, options: str) -> None:
    assert given_by(f"helm {options}")
    assert helm.template(own(merged({"bloodType": "A"}, given_by(f"helm {options}"))))


def test_what_installs_everything_trains_nothing(helm: Helm) -> None:
    (options,) = re.findall(r"`(--set cronJob[^`]*)`", TEXT["docs/kubernetes.md"])
    rendered = Manifests(helm.template(own(merged({"bloodType": "A"}, given_by(f"helm {options}")))))
    assert rendered.of_kind("Job") == []
    assert rendered.one("CronJob")["spec"]["suspend"] is True


@pytest.mark.parametrize("page", PAGES)
def test_values_that_the_page_names_exist(page: str) -> None:
    named = re.findall(r"`([a-z][A-Za-z0-9]*(?:\.[A-Za-z0-9_-]+)+)(?::[^`]*)?`", TEXT[page])
    # settings of the job that the page writes without the prefix `config`
    of_job = ("checkpoints.", "lease.", "base.", "training.")
    names = [name for name in named if not name.endswith(FILES) and not name.startswith(of_job) and "/" not in name]
    for name in names:
        value: Any = DEFAULTS
        first, *rest = name.split(".")
        if first in ("config", "podAnnotations", "status", "spec"):
            continue
        assert first in DEFAULTS, name
        value = DEFAULTS[first]
        for part in rest:
            assert isinstance(value, dict), name
            assert part in value, name
            value = value[part]
    if page == "docs/kubernetes.md":
        assert len(names) > 25


def test_settings_that_the_page_names_exist(helm: Helm) -> None:
    settings = re.findall(r"`(?:config\.)?((?:checkpoints|lease|training)\.[a-z_]+)`", TEXT["docs/kubernetes.md"])
    assert len(settings) >= 5
    for setting in settings:
        # use a valid value, so that Helm rejects only unknown names; most settings reject null
        value = {"training.learning_rate": 0.0001, "training.max_length_tokens": 512}.get(setting, 60)
        assert helm.template(own(merged({"bloodType": "A"}, nested(f"config.{setting}", value))))


def test_the_cluster_names_of_the_page_are_the_manifests(helm: Helm) -> None:
    text = TEXT["docs/kubernetes.md"]
    assert set(re.findall(r"kubectl -n (\S+)", "\n".join(TEXT.values()))) == {"personas"}
    (nightly,) = (command for command in COMMANDS if "cronJob.schedule" in command)
    rendered = Manifests(helm.template(own(given_by(nightly))))
    names = [item["metadata"]["name"] for item in rendered.of_kind("CronJob")]
    (used,) = re.findall(r"--from=cronjob/(\S+)", text)
    assert used in names
    labels = Manifests(helm.template({"bloodType": "A"})).pods[0]["metadata"]["labels"]
    for selector in re.findall(r"-l (\S+)", text):
        for label in selector.split(","):
            name, _, value = label.partition("=")
            assert labels[name] == value


def test_the_secret_of_the_pages_is_the_charts() -> None:
    keys = re.findall(r"--from-literal=(\w+)=", TEXT["k8s/README.md"])
    assert keys == [DEFAULTS["s3"]["secretKeys"][name] for name in ("accessKeyId", "secretAccessKey")]
    (secret,) = re.findall(r"create secret generic (\S+)", TEXT["k8s/README.md"])
    assert secret == yaml.safe_load(BLOCKS[1])["s3"]["existingSecret"] == examples()["minio-values.yaml"]["s3"]["existingSecret"]
