"""The chart as a dependency of a parent chart, and values as `helm --set` makes them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import pytest

from chart.chart_helm import CHART, Helm, Manifests, RefusedError, Values

PARENT: Final = """\
apiVersion: v2
name: platform
version: 1.0.0
dependencies:
  - name: persona-train
    version: ">=0"
    condition: persona-train.enabled
    tags: [training]
"""


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a parent chart with this chart in its charts/."""
    folder = tmp_path_factory.mktemp("charts") / "platform"
    shutil.copytree(CHART, folder / "charts" / "persona-train")
    (folder / "Chart.yaml").write_text(PARENT, encoding="utf-8")
    return folder


def rendered(helm: Helm, parent: Path, helm_version: Any, defaults: str, values: Values | None = None) -> Manifests:
    """Render the parent with `defaults` as its values.yaml and `values` as the user's file."""
    (parent / "values.yaml").write_text(defaults, encoding="utf-8")
    return Manifests(helm.template(values or {}, chart=parent, helm=helm_version))


both = pytest.mark.parametrize("helm_version", ["v3", "v4"])


@both
def test_the_condition_of_a_parent_decides(helm: Helm, parent: Path, helm_version: Any) -> None:
    on = rendered(helm, parent, helm_version, "persona-train: {enabled: true, bloodType: A}")
    assert len(on.jobs) == 1
    # without a blood type, which a chart that is not used does not need
    assert rendered(helm, parent, helm_version, "persona-train: {enabled: false}").objects == []
    off = rendered(
        helm, parent, helm_version, "persona-train: {enabled: true, bloodType: A}", {"persona-train": {"enabled": False}}
    )
    assert off.objects == []
    # the value itself changes nothing, or an upgrade would interrupt a running Job
    unset = rendered(helm, parent, helm_version, "persona-train: {bloodType: A}")
    assert unset.text == on.text


@both
@pytest.mark.parametrize(
    "shared",
    ["{}", "{imageRegistry: x, images: [1, null, {a: 2.5}]}", "{enabled: false, bloodType: Z}", "{postgresql: {auth: {}}}"],
)
def test_values_that_a_parent_shares_are_not_read(helm: Helm, parent: Path, helm_version: Any, shared: str) -> None:
    alone = rendered(helm, parent, helm_version, "persona-train: {bloodType: A}")
    assert rendered(
        helm, parent, helm_version, f"global: {shared}\ntags: {{training: true}}\npersona-train: {{bloodType: A}}"
    ).text == (alone.text)


@both
def test_null_in_a_parent_removes_a_default(helm: Helm, parent: Path, helm_version: Any) -> None:
    defaults = "persona-train: {bloodType: A, config: null, podSecurityContext: {fsGroup: null}, nodeSelector: null, enabled: null}"
    pod = rendered(helm, parent, helm_version, defaults).pods[0]
    assert "fsGroup" not in pod["spec"]["securityContext"]
    with pytest.raises(RefusedError, match="at '/s3': missing property 'region'"):
        rendered(helm, parent, helm_version, "persona-train: {bloodType: A, s3: {region: null}}")


@both
def test_a_parent_is_told_the_same(helm: Helm, parent: Path, helm_version: Any) -> None:
    with pytest.raises(RefusedError, match="at '/output': value must be one of 's3://bucket/prefix/'"):
        rendered(helm, parent, helm_version, "persona-train: {bloodType: A, output: 's3:/team/lora/'}")
    with pytest.raises(RefusedError, match="additional properties 'blodType' not allowed"):
        rendered(helm, parent, helm_version, "persona-train: {bloodType: A, blodType: B}")


@both
def test_large_numbers_stay_whole_numbers(helm: Helm, parent: Path, helm_version: Any) -> None:
    defaults = """
persona-train:
  bloodType: A
  activeDeadlineSeconds: 1000000
  podSecurityContext: {runAsUser: 1000640000}
  config: {limits: {decompressed_bytes: 10000000000}, training: {seed: 4000000000}}
"""
    manifests = rendered(helm, parent, helm_version, defaults)
    (job,) = manifests.jobs.values()
    assert job["activeDeadlineSeconds"] == 1_000_000
    assert job["template"]["spec"]["securityContext"]["runAsUser"] == 1_000_640_000
    assert manifests.settings["limits"]["decompressed_bytes"] == 10_000_000_000
    assert manifests.settings["training"]["seed"] == 4_000_000_000


# what --set and --set-string make of a number, and what the settings file must hold
AS_TEXT: Final = [
    ("training.learning_rate", "0.0001"),
    ("training.learning_rate", "1e-4"),
    ("training.learning_rate", "5E-05"),
    ("training.epochs", ".5"),
    ("training.max_steps", "20"),
    ("training.seed", "1e+06"),
    ("evaluation.intensities", ["0.1", "1.0"]),
    ("memory.micro_batch_tokens", "4096"),
    ("strict", "true"),
]


@both
@pytest.mark.parametrize(("setting", "value"), AS_TEXT)
def test_numbers_that_helm_passes_as_text(helm: Helm, setting: str, value: object, helm_version: Any) -> None:
    nested: Any = value
    for part in reversed(setting.split(".")):
        nested = {part: nested}
    found: Any = Manifests(helm.template({"bloodType": "A", "config": nested}, helm=helm_version)).settings
    for part in setting.split("."):
        found = found[part]
    assert found == value
