"""Test k8s/: Kubernetes, Kueue and Trainer accept it, its quotas fit the chart's Jobs, and its pod matches the chart's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from chart.chart_helm import CHART, REPOSITORY, Helm, Manifests, examples, merged, whole
from chart.combinations import ALL
from chart.kubernetes_rules import VERSIONS, violations

FOLDER: Final = REPOSITORY / "k8s"
RENDERED: Final = sorted((FOLDER / "rendered").glob("*.yaml"))
CUSTOM: Final = ("kueue.x-k8s.io/", "trainer.kubeflow.org/", "kustomize.config.k8s.io/")


def objects(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def one(path: str, kind: str, name: str | None = None) -> dict[str, Any]:
    (found,) = (
        item for item in objects(FOLDER / path) if item["kind"] == kind and (name is None or item["metadata"]["name"] == name)
    )
    return found


EVERYTHING: Final = [(path, item) for path in sorted(FOLDER.rglob("*.yaml")) for item in objects(path)]
OF_KUBERNETES: Final = [(path, item) for path, item in EVERYTHING if not item["apiVersion"].startswith(CUSTOM)]
OF_OTHERS: Final = [(path, item) for path, item in EVERYTHING if item["apiVersion"].startswith(CUSTOM[:2])]


def test_nothing_is_left_out() -> None:
    kinds = {item["kind"] for _, item in EVERYTHING}
    assert kinds >= {"Namespace", "ResourceQuota", "LimitRange", "ServiceAccount", "Kustomization", "Job", "CronJob"}
    assert {item["kind"] for _, item in OF_OTHERS} == {
        "ResourceFlavor", "ClusterQueue", "LocalQueue", "TrainingRuntime", "TrainJob",
    }  # fmt: skip
    assert {path.stem for path in RENDERED} == {name.removesuffix("-values.yaml") for name in examples()}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_of_kubernetes_knows_every_field(schemas: None, version: str) -> None:
    import kubernetes_validate

    for _, item in OF_KUBERNETES:
        kubernetes_validate.validate(item, version, strict=True)


def test_everything_is_in_the_one_namespace() -> None:
    cluster_wide = ("Namespace", "ResourceFlavor", "ClusterQueue", "Kustomization")
    for path, item in EVERYTHING:
        where = item.get("metadata", {}).get("namespace")
        assert where == (None if item["kind"] in cluster_wide else "personas"), path
    assert one("namespace.yaml", "Namespace")["metadata"]["name"] == "personas"


def test_the_namespace_refuses_what_is_not_restricted() -> None:
    labels = one("namespace.yaml", "Namespace")["metadata"]["labels"]
    assert labels == {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")}


def test_kustomize_puts_it_together() -> None:
    kinds = ["Namespace", "ResourceQuota", "LimitRange"]
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text(encoding="utf-8"))
    # The kustomization only lists files, so its output consists of those files.
    assert kustomization.keys() == {"apiVersion", "kind", "resources"}
    listed = [yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))["kind"] for name in kustomization["resources"]]
    assert sorted(listed) == sorted(kinds)
    if kubectl := shutil.which("kubectl"):
        done = subprocess.run([kubectl, "kustomize", FOLDER], capture_output=True, text=True, check=True, timeout=60)
        assert [item["kind"] for item in yaml.safe_load_all(done.stdout)] == kinds


def test_the_rendered_examples_are_what_the_chart_gives() -> None:
    tool = REPOSITORY / "tools" / "k8s_rendered.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.stem)
def test_a_rendered_example_is_the_newest_helms_as_well(helm: Helm, path: Path) -> None:
    by_name = {item["metadata"]["name"] + item["kind"]: item for item in objects(path)}
    text = helm.template(examples()[f"{path.stem}-values.yaml"])
    assert by_name == {item["metadata"]["name"] + item["kind"]: item for item in Manifests(text).objects}


# -- quota ----------------------------------------------------------------------------------------------

_UNITS: Final = {"": Decimal(1), "m": Decimal("0.001"), "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30)}


def amount(quantity: str | int) -> Decimal:
    """Parse a Kubernetes quantity in the notations that these files use."""
    match = re.fullmatch(r"([0-9.]+)(m|Ki|Mi|Gi|)", str(quantity))
    assert match, quantity
    return Decimal(match[1]) * _UNITS[match[2]]


def test_amounts() -> None:
    assert [amount(text) for text in ("100m", "4", 1, "2Ki", "1.5Gi")] == [Decimal("0.1"), 4, 1, 2048, 1610612736]


def used(pods: list[dict[str, Any]]) -> dict[str, Decimal]:
    """Return the usage that a ResourceQuota counts for these pods after the LimitRange has set its defaults."""
    (container_limits,) = (item for item in one("limit-range.yaml", "LimitRange")["spec"]["limits"] if item["type"] == "Container")
    total: dict[str, Decimal] = {}
    for pod in pods:
        for container in pod["spec"]["containers"]:
            limits = container_limits["default"] | container["resources"]["limits"]
            requests = container_limits["defaultRequest"] | container["resources"]["requests"]
            for kind, amounts in (("requests", requests), ("limits", limits)):
                for name, quantity in amounts.items():
                    assert amount(quantity) <= amount(container_limits["max"].get(name, quantity)), name
                    total[f"{kind}.{name}"] = total.get(f"{kind}.{name}", Decimal(0)) + amount(quantity)
            for name in requests:
                assert amount(requests[name]) <= amount(limits[name]), name
    return total


def default_pods(helm: Helm) -> list[dict[str, Any]]:
    """Return the pods of one Job per persona and of `helm test`."""
    return [*Manifests(helm.template(ALL)).pods, yaml.safe_load(whole(ALL)["tests/check-storage.yaml"])]


def test_the_quota_admits_a_job_for_each_persona_and_the_storage_check(helm: Helm) -> None:
    hard = one("resource-quota.yaml", "ResourceQuota")["spec"]["hard"]
    pods = default_pods(helm)
    assert len(pods) == 5
    counted = used(pods)
    bounded = {name for name in hard if name.startswith(("requests.", "limits.")) and name != "requests.storage"}
    # A GPU's limit equals its request, and a ResourceQuota supports only the request.
    assert bounded == set(counted) - {"limits.nvidia.com/gpu"}
    for name in bounded:
        assert counted[name] <= amount(hard[name]), name


def test_the_quota_does_not_admit_a_fifth_job(helm: Helm) -> None:
    hard = one("resource-quota.yaml", "ResourceQuota")["spec"]["hard"]
    pods = default_pods(helm)
    counted = used([*pods, pods[0]])
    assert all(
        counted[name] > amount(hard[name])
        for name in ("requests.nvidia.com/gpu", "requests.cpu", "requests.memory", "requests.ephemeral-storage")
    )


def test_claims_of_the_chart_fit(helm: Helm) -> None:
    values = {name: {"createClaim": True} for name in ("workVolume", "modelCache", "compileCache")}
    claims = Manifests(helm.template(merged(ALL, values))).of_kind("PersistentVolumeClaim")
    sizes = [amount(claim["spec"]["resources"]["requests"]["storage"]) for claim in claims]
    hard = one("resource-quota.yaml", "ResourceQuota")["spec"]["hard"]
    (bound,) = (
        item["max"] for item in one("limit-range.yaml", "LimitRange")["spec"]["limits"] if item["type"] == "PersistentVolumeClaim"
    )
    assert max(sizes) <= amount(bound["storage"])
    # The quota has room for two releases.
    assert 2 * sum(sizes) <= amount(hard["requests.storage"])
    assert 2 * len(sizes) <= int(hard["persistentvolumeclaims"])


def test_nobody_gets_a_gpu_by_default() -> None:
    """A LimitRange applies its maximum as the default to every container that sets no limit."""
    for item in one("limit-range.yaml", "LimitRange")["spec"]["limits"]:
        assert not any("gpu" in name for part in item.values() if isinstance(part, dict) for name in part)
        if item["type"] == "Container":
            assert set(item["max"]) == set(item["default"]) == set(item["defaultRequest"])


# -- Kueue ----------------------------------------------------------------------------------------------

# The fields of kueue.x-k8s.io/v1beta2 that these files use, from its CRDs.
_FLAVOR_FIELDS: Final = {"nodeLabels", "nodeTaints", "tolerations", "topologyName"}
_QUEUE_FIELDS: Final = {"namespaceSelector", "preemption", "resourceGroups", "queueingStrategy", "flavorFungibility", "cohortName"}
_PREEMPTION: Final = {"Never", "LowerPriority", "LowerOrNewerEqualPriority"}


def test_fields_of_kueue() -> None:
    for _, item in OF_OTHERS:
        if not item["apiVersion"].startswith("kueue"):
            continue
        assert item["apiVersion"] == "kueue.x-k8s.io/v1beta2"
        assert set(item) == {"apiVersion", "kind", "metadata", "spec"}
        spec = item["spec"]
        if item["kind"] == "ResourceFlavor":
            assert set(spec) <= _FLAVOR_FIELDS
            assert len(spec["nodeLabels"]) <= 8
            for toleration in spec.get("tolerations", []):
                assert toleration["operator"] == "Exists"
                assert set(toleration) == {"key", "operator", "effect"}
        elif item["kind"] == "ClusterQueue":
            assert set(spec) <= _QUEUE_FIELDS
            assert set(spec["preemption"]) == {"withinClusterQueue"}
            assert spec["preemption"]["withinClusterQueue"] in _PREEMPTION
            for group in spec["resourceGroups"]:
                assert set(group) == {"coveredResources", "flavors"}
                for flavor in group["flavors"]:
                    assert set(flavor) == {"name", "resources"}
                    # Kueue requires each flavor to list all covered resources in this order.
                    assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]
                    assert all(set(resource) == {"name", "nominalQuota"} for resource in flavor["resources"])
        else:
            assert spec == {"clusterQueue": "personas"}


def test_the_queues_hang_together() -> None:
    queue = one("kueue/queues.yaml", "ClusterQueue")
    flavors = {item["metadata"]["name"] for item in objects(FOLDER / "kueue/queues.yaml") if item["kind"] == "ResourceFlavor"}
    (group,) = queue["spec"]["resourceGroups"]
    assert {flavor["name"] for flavor in group["flavors"]} == flavors
    assert one("kueue/queues.yaml", "LocalQueue")["spec"]["clusterQueue"] == queue["metadata"]["name"]
    assert queue["spec"]["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "personas"}}
    # The chart's example and the TrainJob name this queue.
    name = one("kueue/queues.yaml", "LocalQueue")["metadata"]["name"]
    assert examples()["shared-values.yaml"]["kueue"]["queueName"] == name
    assert one("kubeflow/train-job.yaml", "TrainJob")["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": name}


def test_kueue_admits_a_job_on_either_flavor_and_no_more_than_the_quota(helm: Helm) -> None:
    (group,) = one("kueue/queues.yaml", "ClusterQueue")["spec"]["resourceGroups"]
    requests = Manifests(helm.template({"bloodType": "A"})).trainer["resources"]["requests"]
    # Kueue never admits a request for a resource that the queue does not cover.
    assert set(requests) == set(group["coveredResources"])
    total = dict.fromkeys(requests, Decimal(0))
    for flavor in group["flavors"]:
        for resource in flavor["resources"]:
            assert amount(resource["nominalQuota"]) >= amount(requests[resource["name"]]), flavor["name"]
            total[resource["name"]] += amount(resource["nominalQuota"])
    # Otherwise Kueue would admit Jobs that the quota then rejects.
    hard = one("resource-quota.yaml", "ResourceQuota")["spec"]["hard"]
    for name, quantity in total.items():
        assert quantity <= amount(hard[f"requests.{name}"]), name


# -- Kubeflow Trainer -----------------------------------------------------------------------------------


def job_of_the_runtime() -> dict[str, Any]:
    """Return the template of the only Job that Trainer creates from the runtime."""
    (job,) = one("kubeflow/training-runtime.yaml", "TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]
    assert job["name"] == "node"
    assert set(job) == {"name", "template"}
    return dict(job["template"])


@pytest.mark.parametrize("kind", ["TrainingRuntime", "TrainJob"])
def test_trainers_own_models_take_it(kind: str) -> None:
    """Trainer's models drop unknown fields, so every field that survives a round trip is known."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed: make chart-test")
    (given,) = (item for _, item in OF_OTHERS if item["kind"] == kind)
    model = getattr(models, f"TrainerV1alpha1{kind}")
    assert model.from_dict(given).to_dict() == given
    unknown = merged(given, {"spec": {"mlpolicy": {}}})
    assert model.from_dict(unknown).to_dict() == given


@pytest.mark.parametrize("version", VERSIONS)
def test_the_runtimes_job_is_one(schemas: None, version: str) -> None:
    import kubernetes_validate

    template = job_of_the_runtime()
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"} | template["metadata"], "spec": template["spec"]}
    kubernetes_validate.validate(job, version, strict=True)


def test_the_runtime_is_found_by_trainer() -> None:
    spec = one("kubeflow/training-runtime.yaml", "TrainingRuntime")["spec"]
    # With no framework in mlPolicy, the runtime is a plain Job: one process, no torchrun.
    assert spec["mlPolicy"] == {"numNodes": 1}
    assert job_of_the_runtime()["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    reference = one("kubeflow/train-job.yaml", "TrainJob")["spec"]["runtimeRef"]
    assert reference == {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "lora-trainer"}


def test_pod_security_restricted_admits_the_runtimes_pod() -> None:
    pod = job_of_the_runtime()["spec"]["template"]
    assert list(violations(pod)) == []
    (container,) = pod["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_runtimes_pod_is_the_charts(helm: Helm) -> None:
    """The pods differ only in the settings file and the options, which a TrainJob sets. The runtime uses variables instead."""
    ((_, chart),) = Manifests(helm.template({"bloodType": "A"})).jobs.items()
    runtime = job_of_the_runtime()["spec"]
    theirs, ours = chart["template"]["spec"], runtime["template"]["spec"]
    (trainer,), (node,) = theirs.pop("containers"), ours.pop("containers")
    theirs["volumes"] = [volume for volume in theirs["volumes"] if volume["name"] != "config"]
    assert ours == theirs
    options = dict(argument.removeprefix("--").split("=", 1) for argument in trainer.pop("args")[1:])
    variables = {entry["name"]: entry["value"] for entry in node["env"]}
    assert variables.pop("LORA_TRAINER_WORK_DIR") == options["work-dir"]
    assert variables.pop("LORA_TRAINER_DEVICE") == options["device"]
    assert f"base.cache_dir={variables.pop('LORA_TRAINER_BASE__CACHE_DIR')}" == options["set"]
    assert variables == {entry["name"]: entry["value"] for entry in trainer.pop("env")}
    trainer["volumeMounts"] = [mount for mount in trainer["volumeMounts"] if mount["name"] != "config"]
    assert {key: value for key, value in node.items() if key not in ("name", "env")} == {
        key: value for key, value in trainer.items() if key != "name"
    }
    policy = json.loads(json.dumps(chart["podFailurePolicy"]).replace('"trainer"', '"node"'))
    assert runtime["podFailurePolicy"] == policy
    assert (runtime["backoffLimit"], runtime["activeDeadlineSeconds"]) == (chart["backoffLimit"], chart["activeDeadlineSeconds"])


def test_the_train_jobs_options_are_the_jobs(helm: Helm) -> None:
    arguments = one("kubeflow/train-job.yaml", "TrainJob")["spec"]["trainer"]["args"]
    from_chart = Manifests(helm.template(examples()["minimal-values.yaml"])).trainer["args"]
    # The job's defaults or the runtime's variables cover the chart's other arguments.
    assert set(arguments) <= set(from_chart)
    assert [argument.split("=")[0] for argument in arguments] == ["run", "--blood-type", "--data", "--output"]


# -- IRSA -----------------------------------------------------------------------------------------------


def test_the_role_is_that_of_the_charts_service_account(helm: Helm) -> None:
    account = one("aws/service-account.yaml", "ServiceAccount")
    (statement,) = json.loads((FOLDER / "aws" / "trust-policy.json").read_text(encoding="utf-8"))["Statement"]
    provider = statement["Principal"]["Federated"].partition("oidc-provider/")[2]
    assert statement["Condition"] == {
        "StringEquals": {
            f"{provider}:aud": "sts.amazonaws.com",
            f"{provider}:sub": f"system:serviceaccount:personas:{account['metadata']['name']}",
        }
    }
    made = Manifests(helm.template(examples()["irsa-values.yaml"])).one("ServiceAccount")
    for field in ("name", "namespace", "annotations"):
        assert made["metadata"][field] == account["metadata"][field]
    assert made["automountServiceAccountToken"] is account["automountServiceAccountToken"] is False
    ours = one("kubeflow/training-runtime.yaml", "TrainingRuntime")["metadata"]["namespace"]
    assert ours == account["metadata"]["namespace"]
    assert job_of_the_runtime()["spec"]["template"]["spec"]["serviceAccountName"] == account["metadata"]["name"]


def test_the_image_is_the_charts() -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))["appVersion"]
    (container,) = job_of_the_runtime()["spec"]["template"]["spec"]["containers"]
    assert container["image"].endswith(f":{version}")
