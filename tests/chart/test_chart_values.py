"""Every value in values.yaml does what its comment says: change each one alone and look for its effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
import yaml

from chart.chart_helm import CHART, Helm, Manifests, Values, merged, nested, whole

A: Final[Values] = {"bloodType": "A"}
BOTH: Final[Values] = {"bloodType": "", "bloodTypes": ["A", "B"]}
IN_SECRET: Final[Values] = {"s3": {"existingSecret": "keys"}}
NIGHTLY: Final[Values] = {"cronJob": {"schedule": "0 3 * * *"}}
DIGEST: Final = f"sha256:{'0123456789abcdef' * 4}"


@dataclass(frozen=True)
class Change:
    """A value to set on top of `given`, and its expected effect on the manifests."""

    value: Any
    shows: str
    """Text that must appear in the manifests, with white space collapsed."""
    given: Values = field(default_factory=dict)
    hides: str = ""
    """Text that must disappear: only the default renders it."""
    also: Values = field(default_factory=dict)
    """Other values that must change with it."""

    @property
    def before(self) -> Values:
        return merged(A, self.given)

    def after(self, dotted: str) -> Values:
        return merged(self.before, nested(dotted, self.value), self.also)


def volume(name: str, template: str) -> dict[str, Change]:
    claim: Values = {template: {"createClaim": True}}
    return {
        f"{template}.size": Change("77Gi", f"name: {name} emptyDir: sizeLimit: 77Gi"),
        f"{template}.createClaim": Change(True, f"claimName: persona-train-{name}", hides=f"name: {name} emptyDir:"),
        f"{template}.storageClassName": Change("fast", "storageClassName: fast", given=claim),
        f"{template}.accessMode": Change("ReadWriteMany", "accessModes: - ReadWriteMany", given=claim),
        f"{template}.existingClaim": Change("mine", f"name: {name} persistentVolumeClaim: claimName: mine"),
    }


CHANGES: Final[dict[str, Change]] = {
    "bloodType": Change("AB", "--blood-type=AB", hides="--blood-type=A "),
    "bloodTypes": Change(["B", "O"], "--blood-type=O", also={"bloodType": ""}),
    "jobs": Change(
        "shared", "persona-train/blood-types: A-B", hides="--blood-type=B ", given={"bloodType": "", "bloodTypes": ["A", "B"]}
    ),
    "image.repository": Change("registry.example.com/team/trainer", "image: registry.example.com/team/trainer:"),
    "image.tag": Change("1.2.3", "lora-trainer:1.2.3"),
    "image.digest": Change(DIGEST, f"lora-trainer@{DIGEST}", given={"image": {"tag": "1.2.3"}}, hides=":1.2.3"),
    "image.pullPolicy": Change("IfNotPresent", "imagePullPolicy: IfNotPresent"),
    "image.pullSecrets": Change(["one", "two"], "imagePullSecrets: - name: one - name: two"),
    "data": Change("s3://mine/in/", "--data=s3://mine/in/"),
    "output": Change("s3://mine/out/", "--output=s3://mine/out/"),
    "s3.endpoint": Change("http://minio:9000", "name: AWS_ENDPOINT_URL value: http://minio:9000"),
    "s3.region": Change("ap-northeast-2", "name: AWS_REGION value: ap-northeast-2"),
    "s3.serverSideEncryption": Change("AES256", "--set=storage.server_side_encryption=AES256"),
    "s3.kmsKeyId": Change(
        "alias/personas", "--set=storage.kms_key_id=alias/personas", given={"s3": {"serverSideEncryption": "aws:kms"}}
    ),
    "s3.existingSecret": Change("keys", "secretKeyRef: key: AWS_SECRET_ACCESS_KEY name: keys"),
    "s3.secretKeys.accessKeyId": Change("user", "name: AWS_ACCESS_KEY_ID valueFrom: secretKeyRef: key: user", given=IN_SECRET),
    "s3.secretKeys.secretAccessKey": Change("pw", "name: AWS_SECRET_ACCESS_KEY valueFrom: secretKeyRef: key: pw", given=IN_SECRET),
    "s3.secretKeys.sessionToken": Change(
        "token", "name: AWS_SESSION_TOKEN valueFrom: secretKeyRef: key: token name: keys optional: true", given=IN_SECRET
    ),
    "caBundle.configMap": Change("company", "name: ca configMap: name: company items: - key: ca.crt path: ca.crt"),
    "caBundle.secret": Change("company", "name: ca secret: secretName: company items: - key: ca.crt path: ca.crt"),
    "caBundle.key": Change("bundle.pem", "key: bundle.pem path: ca.crt", given={"caBundle": {"secret": "company"}}),
    "caBundle.scope": Change("all", "name: SSL_CERT_FILE value: /etc/lora-trainer/ca/ca.crt", given={"caBundle": {"secret": "c"}}),
    "baseModel.id": Change("org/base", "--base-model=org/base"),
    "baseModel.revision": Change("0" * 40, f"--base-revision={'0' * 40}"),
    "baseModel.s3Uri": Change(
        "s3://mine/bases/x/",
        "--base-model=s3://mine/bases/x/ - --set=base.canonical_id=Qwen/Qwen2.5-7B-Instruct",
        hides="--base-revision",
    ),
    "baseModel.existingClaim": Change(
        "bases", "--base-model=/models - --set=base.canonical_id=Qwen/Qwen2.5-7B-Instruct", hides="--base-revision"
    ),
    "baseModel.path": Change("qwen/7b/", "--base-model=/models/qwen/7b", given={"baseModel": {"existingClaim": "bases"}}),
    "hfToken.existingSecret": Change("hub", "name: HF_TOKEN valueFrom: secretKeyRef: key: HF_TOKEN name: hub"),
    "hfToken.key": Change("read", "secretKeyRef: key: read name: hub", given={"hfToken": {"existingSecret": "hub"}}),
    "config": Change({"training": {"epochs": 5}}, "training: epochs: 5"),
    "device": Change("cpu", "--device=cpu", hides="nvidia.com/gpu:"),
    "gpu.resource": Change("nvidia.com/mig-3g.40gb", "nvidia.com/mig-3g.40gb: 1", hides="nvidia.com/gpu: 1"),
    "gpu.enabled": Change(True, "nvidia.com/gpu: 1", given={"device": "cpu"}),
    "resources.requests.cpu": Change("3", "requests: cpu: 3"),
    "resources.requests.memory": Change("23Gi", "memory: 23Gi"),
    "resources.requests.ephemeral-storage": Change("39Gi", "ephemeral-storage: 39Gi"),
    "resources.limits.cpu": Change("9", "limits: cpu: 9"),
    "resources.limits.memory": Change("33Gi", "memory: 33Gi"),
    "resources.limits.ephemeral-storage": Change("61Gi", "ephemeral-storage: 61Gi"),
    "sharedMemory.size": Change("3Gi", "emptyDir: medium: Memory sizeLimit: 3Gi"),
    "tmp.size": Change("6Gi", "name: tmp emptyDir: sizeLimit: 6Gi"),
    **volume("work", "workVolume"),
    **volume("models", "modelCache"),
    **volume("compiled", "compileCache"),
    "backoffLimit": Change(0, "backoffLimit: 0"),
    "activeDeadlineSeconds": Change(3600, "activeDeadlineSeconds: 3600"),
    "ttlSecondsAfterFinished": Change(0, "ttlSecondsAfterFinished: 0"),
    "terminationGracePeriodSeconds": Change(30, "terminationGracePeriodSeconds: 30"),
    "unreachableTolerationSeconds": Change(0, "effect: NoExecute tolerationSeconds: 0"),
    "kueue.queueName": Change("personas", "kueue.x-k8s.io/queue-name: personas"),
    "cronJob.schedule": Change("0 3 * * *", "kind: CronJob", hides="kind: Job "),
    "cronJob.timeZone": Change("Asia/Seoul", "timeZone: Asia/Seoul", given=NIGHTLY),
    "cronJob.concurrencyPolicy": Change("Replace", "concurrencyPolicy: Replace", given=NIGHTLY),
    "cronJob.startingDeadlineSeconds": Change(60, "startingDeadlineSeconds: 60", given=NIGHTLY),
    "cronJob.successfulJobsHistoryLimit": Change(0, "successfulJobsHistoryLimit: 0", given=NIGHTLY),
    "cronJob.failedJobsHistoryLimit": Change(0, "failedJobsHistoryLimit: 0", given=NIGHTLY),
    "cronJob.suspend": Change(True, "suspend: true", given=NIGHTLY),
    "serviceAccount.create": Change(False, "serviceAccountName: default", hides="kind: ServiceAccount"),
    "serviceAccount.name": Change("trainers", "serviceAccountName: trainers"),
    "serviceAccount.annotations": Change({"a.b/c": "role"}, "annotations: a.b/c: role"),
    "podSecurityContext.runAsNonRoot": Change(False, "runAsNonRoot: false"),
    "podSecurityContext.runAsUser": Change(12345, "runAsUser: 12345"),
    "podSecurityContext.runAsGroup": Change(12345, "runAsGroup: 12345"),
    "podSecurityContext.fsGroup": Change(12345, "fsGroup: 12345"),
    "podSecurityContext.fsGroupChangePolicy": Change("Always", "fsGroupChangePolicy: Always"),
    "podSecurityContext.seccompProfile.type": Change("Localhost", "seccompProfile: type: Localhost"),
    "securityContext.allowPrivilegeEscalation": Change(True, "allowPrivilegeEscalation: true"),
    "securityContext.readOnlyRootFilesystem": Change(False, "readOnlyRootFilesystem: false"),
    "securityContext.capabilities.drop": Change(["NET_RAW"], "drop: - NET_RAW"),
    "networkPolicy.enabled": Change(False, "", hides="kind: NetworkPolicy"),
    "networkPolicy.cidrs": Change(["10.0.0.0/8"], "ipBlock: cidr: 10.0.0.0/8 ports:", hides="0.0.0.0/0"),
    "networkPolicy.ports": Change([3128], "port: 443 - protocol: TCP port: 3128"),
    "networkPolicy.extraEgress": Change([{"to": [{"ipBlock": {"cidr": "10.1.2.3/32"}}]}], "- to: - ipBlock: cidr: 10.1.2.3/32"),
    "nodeSelector": Change({"gpu": "h100"}, "nodeSelector: gpu: h100"),
    "tolerations": Change([{"key": "spot", "operator": "Exists"}], "- key: spot operator: Exists", hides="key: nvidia.com/gpu"),
    "affinity": Change({"nodeAffinity": {"x": 1}}, "affinity: nodeAffinity: x: 1"),
    "topologySpreadConstraints": Change([{"maxSkew": 1}], "topologySpreadConstraints: - maxSkew: 1"),
    "priorityClassName": Change("high", "priorityClassName: high"),
    "runtimeClassName": Change("nvidia", "runtimeClassName: nvidia"),
    "extraEnv": Change([{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}], "- name: HTTPS_PROXY value: http://proxy:3128"),
    "extraEnvFrom": Change([{"secretRef": {"name": "more"}}], "envFrom: - secretRef: name: more"),
    "extraVolumes": Change([{"name": "more", "emptyDir": {}}], "- emptyDir: {} name: more"),
    "extraVolumeMounts": Change([{"name": "more", "mountPath": "/more"}], "- mountPath: /more name: more"),
    "initContainers": Change([{"name": "first", "image": "x"}], "initContainers: - image: x name: first"),
    "jobLabels": Change({"team": "voice"}, "team: voice"),
    "jobAnnotations": Change({"team": "voice"}, "annotations: team: voice"),
    "podLabels": Change({"team": "voice"}, "team: voice"),
    "podAnnotations": Change({"team": "voice"}, "annotations: team: voice spec: serviceAccountName"),
    "storageCheck.nodeSelector": Change({"gpu": "none"}, "nodeSelector: gpu: none"),
    "storageCheck.resources.requests.cpu": Change("111m", "cpu: 111m"),
    "storageCheck.resources.requests.memory": Change("511Mi", "memory: 511Mi"),
    "storageCheck.resources.limits.cpu": Change("1111m", "cpu: 1111m"),
    "storageCheck.resources.limits.memory": Change("1023Mi", "memory: 1023Mi"),
}


def leaves(values: Values, prefix: str = "") -> Iterator[str]:
    """Yield the values that a user can set: scalars, lists, and maps that are empty by default."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


DEFAULTS: Final[Values] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


def test_every_value_has_its_test() -> None:
    assert list(CHANGES) == list(leaves(DEFAULTS))


def flat(values: Values) -> str:
    """Return all manifests as one line without quotation marks. It ends in a space, so that `kind: Job ` can match at the end."""
    rendered = whole(values)
    del rendered["NOTES.txt"]
    return " ".join(" ".join(text.split()) for text in rendered.values()).replace('"', "") + " "


@pytest.mark.parametrize("dotted", CHANGES)
def test_a_value_shows(dotted: str) -> None:
    change = CHANGES[dotted]
    before, after = flat(change.before), flat(change.after(dotted))
    assert after != before
    if change.shows:
        assert change.shows in after
        assert change.shows not in before
    if change.hides:
        assert change.hides in before
        assert change.hides not in after


@pytest.mark.parametrize("dotted", CHANGES)
def test_the_job_has_another_name_exactly_if_it_could_not_be_changed(helm: Helm, dotted: str) -> None:
    change = CHANGES[dotted]
    before, after = (Manifests(helm.template(values)) for values in (change.before, change.after(dotted)))

    def fixed(manifests: Manifests) -> dict[str, list[Any]]:
        """Return each Job's immutable fields by name. Kubernetes rejects changes to them, and Kueue to the label."""
        return {
            job["metadata"]["name"]: [
                job["spec"]["template"],
                job["spec"]["podFailurePolicy"],
                job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name"),
            ]
            for job in manifests.of_kind("Job")
        }

    old, new = fixed(before), fixed(after)
    assert all(old[name] == new[name] for name in old.keys() & new.keys())
    assert not [name for name in new.keys() - old.keys() if new[name] in old.values()]


def test_an_upgrade_without_a_change_changes_nothing(helm: Helm) -> None:
    assert helm.template(A) == helm.template(A)
