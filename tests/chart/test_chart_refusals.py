"""Helm rejects wrong values before it installs anything, with a message that names them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
import yaml

from chart.chart_helm import CHART, Helm, Manifests, RefusedError, Values, merged, nested, whole

A: Final[Values] = {"bloodType": "A"}

BY_THE_SCHEMA: Final[tuple[tuple[str, Any], ...]] = (
    ("bloodType", "C"),
    ("bloodType", "a"),
    ("bloodType", ["A"]),
    ("bloodTypes", ["A", "A"]),
    ("bloodTypes", ["all"]),
    ("jobs", "both"),
    ("image.repository", ""),
    ("image.repository", "lora-trainer@sha256:1"),
    ("image.tag", "a b"),
    ("image.digest", "sha256:123"),
    ("image.pullPolicy", "Sometimes"),
    ("data", "data/"),
    ("data", "s3://key:secret@bucket/data/"),
    ("output", "gs://bucket/lora/"),
    ("output", "s3:/team/lora/"),
    ("output", "S3://team/lora/"),
    ("output", "s3a://team/lora/"),
    ("output", "s3:///team/lora/"),
    ("output", "s3://team//lora/"),
    ("output", "s3://team/lora/ "),
    ("output", "s3://team/lora/\u00a0"),
    ("output", "s3://te\u200bam/lora/"),
    ("output", '"s3://team/lora/"'),
    ("output", "s3://${BUCKET}/lora/"),
    ("output", "s3://<bucket>/lora/"),
    ("output", "s3://{{ .Values.bucket }}/lora/"),
    ("output", "https://team.s3.ap-northeast-2.amazonaws.com/lora/"),
    ("output", "s3://minio:9000/team/lora/"),
    ("output", "file:/srv/lora/"),
    ("data", "s3://team/data/?versionId=1"),
    ("data", "arn:aws:s3:::team/data/"),
    ("baseModel.s3Uri", "s3:/team/base/"),
    ("config.evaluation.prompts", "s3:/team/prompts.jsonl"),
    ("output", ""),
    ("s3.endpoint", "minio:9000"),
    ("s3.endpoint", "https://user:password@minio:9000"),
    ("s3.serverSideEncryption", "SSE-S3"),
    ("s3.kmsKeyId", "my key"),
    ("s3.existingSecret", "Not_A_Name"),
    ("s3.secretKeys.accessKeyId", ""),
    ("caBundle.scope", "hub"),
    ("baseModel.id", "/models/qwen"),
    ("baseModel.revision", "main"),
    ("baseModel.s3Uri", "https://bucket/base/"),
    ("baseModel.path", "../etc"),
    ("device", "gpu"),
    ("gpu.enabled", "yes"),
    ("gpu.resource", "gpu"),
    ("resources.limits.memory", "32 GB"),
    ("sharedMemory.size", ""),
    ("tmp.size", 1000000000),
    ("workVolume.accessMode", "ReadOnlyMany"),
    ("modelCache.size", "lots"),
    ("backoffLimit", -1),
    ("backoffLimit", "6"),
    ("activeDeadlineSeconds", 0),
    ("ttlSecondsAfterFinished", -1),
    ("terminationGracePeriodSeconds", 5),
    ("unreachableTolerationSeconds", -1),
    ("cronJob.schedule", "nightly"),
    ("cronJob.schedule", "0 3 * *"),
    ("cronJob.timeZone", "+09:00"),
    ("cronJob.concurrencyPolicy", "Allow"),
    ("serviceAccount.name", "Trainer"),
    ("serviceAccount.annotations", {"a": 1}),
    ("podSecurityContext.runAsUser", -1),
    ("securityContext.allowPrivilegeEscalation", "no"),
    ("networkPolicy.cidrs", ["storage.example.com"]),
    ("networkPolicy.ports", [0]),
    ("nodeSelector", {"a": True}),
    ("tolerations", ["spot"]),
    ("affinity", {"node": {}}),
    ("extraEnv", [{"value": "x"}]),
    ("extraVolumeMounts", [{"name": "x"}]),
    ("initContainers", [{"image": "x"}]),
    ("podLabels", {"a": 1}),
    ("config.training.epochs", 0),
    ("config.training.learning_rate", "high"),
    ("config.lora.r", 1.5),
    ("config.lora.target_modules", ["lm_head"]),
    ("config.evaluation.intensities", []),
    ("config.memory.micro_batch_tokens", 63),
    ("config.checkpoints.every_minutes", 1441),
    ("config.logging.level", "loud"),
    ("config.strict", "yes"),
    ("config.training.learning_rate", "0.0001x"),
    ("config.training.max_steps", "1.5"),
    ("config.training.learning_rate", ".inf"),
    ("enabled", "yes"),
    ("config.gates.persona", 1.1),
)


@pytest.mark.parametrize("helm_version", ["v3", "v4"])
@pytest.mark.parametrize(("dotted", "value"), BY_THE_SCHEMA)
def test_a_value_out_of_bounds(helm: Helm, dotted: str, value: object, helm_version: Any) -> None:
    with pytest.raises(RefusedError) as refused:
        helm.template(merged(A, nested(dotted, value)), helm=helm_version)
    assert f"'/{dotted.replace('.', '/')}" in str(refused.value)


# One typo per section.
TYPOS: Final = (
    "bloodtype", "image.digets", "s3.endpont", "s3.secretKeys.accesKeyId", "caBundle.configmap", "baseModel.revison",
    "hfToken.secret", "gpu.count", "resources.request", "sharedMemory.sizeLimit", "tmp.sizeLimit", "workVolume.storageClass",
    "modelCache.claim", "compileCache.type", "kueue.queue", "cronJob.timezone", "serviceAccount.automount",
    "podSecurityContext.runAsNonroot", "podSecurityContext.seccompProfile.kind", "securityContext.privileged",
    "securityContext.capabilities.dropp", "networkPolicy.cidr", "affinity.podAffinities", "storageCheck.enabled",
    "storageCheck.resources.limit", "config.trainin", "config.training.epoch", "config.lora.rank", "config.base.models",
    "config.evaluation.temprature", "config.gates.tone", "config.memory.micro_batch", "config.checkpoints.every_step",
    "config.storage.budget_s", "config.lease.duration", "config.limits.lines", "config.logging.levl",
)  # fmt: skip


@pytest.mark.parametrize("helm_version", ["v3", "v4"])
@pytest.mark.parametrize("dotted", TYPOS)
def test_a_typing_error(helm: Helm, dotted: str, helm_version: Any) -> None:
    with pytest.raises(RefusedError) as refused:
        helm.template(merged(A, nested(dotted, {})), helm=helm_version)
    *sections, typo = dotted.split(".")
    assert f"at '{''.join(f'/{section}' for section in sections)}'" in str(refused.value)
    assert f"'{typo}' not allowed" in str(refused.value)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"bloodTypes": ["B"]}, ["bloodType: got A", "bloodTypes [B]"]),
        (
            {"bloodType": "", "bloodTypes": ["A", "B"], "data": "s3://mine/train_data_type_A.jsonl.gz"},
            ["data: got ", "s3://mine/train_data_type_A.jsonl.gz", "A, B", "expected a folder"],
        ),
        ({"resources": {"limits": {"nvidia.com/gpu": 2}}}, ["resources.limits: got nvidia.com/gpu", "gpu.resource"]),
        ({"output": "s3://My_Team/lora/"}, ["output: got the bucket My_Team", "s3.endpoint"]),
        ({"data": "s3://team/data.csv"}, ["data: got s3://team/data.csv", "lora-trainer convert"]),
        ({"enabled": False}, ["enabled: got false", "condition: persona-train.enabled"]),
        ({"config": {"data": "s3://b/d/"}}, ["config.data: ", "instead: data"]),
        ({"config": {"output": "s3://b/d/"}}, ["config.output: ", "instead: output"]),
        ({"config": {"blood_type": "B"}}, ["config.blood_type: ", "instead: bloodType"]),
        ({"config": {"device": "cpu"}}, ["config.device: ", "instead: device"]),
        ({"config": {"work_dir": "/x"}}, ["config.work_dir: ", "instead: workVolume"]),
        ({"config": {"base": {"revision": None}}}, ["config.base.revision: ", "instead: baseModel, modelCache"]),
        (
            {"baseModel": {"s3Uri": "s3://bucket/x/", "existingClaim": "c"}},
            ["baseModel.s3Uri: ", "baseModel.existingClaim"],
        ),
        ({"baseModel": {"path": "x"}}, ["baseModel.path: ", "expected baseModel.existingClaim"]),
        ({"caBundle": {"configMap": "a", "secret": "b"}}, ["caBundle.configMap: ", "caBundle.secret"]),
        ({"s3": {"kmsKeyId": "k", "serverSideEncryption": "AES256"}}, ["s3.kmsKeyId: ", "s3.serverSideEncryption=aws:kms"]),
        ({"modelCache": {"createClaim": True, "existingClaim": "a"}}, ["modelCache.existingClaim: ", "createClaim"]),
        (
            {"config": {"checkpoints": {"grace_s": 120}}},
            ["config.checkpoints.grace_s: got 120", "less than terminationGracePeriodSeconds, 120"],
        ),
        ({"extraVolumes": [{"name": "work", "emptyDir": {}}]}, ["extraVolumes work: "]),
        ({"cronJob": {"timeZone": "Asia/Seoul"}}, ["cronJob.timeZone: ", "cronJob.schedule"]),
        (
            {"extraEnv": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]},
            ["extraEnv AWS_SECRET_ACCESS_KEY: ", "Secret: s3.existingSecret"],
        ),
    ],
)
def test_what_does_not_go_together(values: Values, parts: list[str]) -> None:
    with pytest.raises(RefusedError) as refused:
        whole(merged(A, values))
    (line,) = (line for line in str(refused.value).splitlines() if parts[0] in line)
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize("helm_version", ["v3", "v4"])
def test_the_message_names_the_right_spelling_and_no_signature(helm: Helm, helm_version: Any) -> None:
    with pytest.raises(RefusedError) as refused:
        helm.template(merged(A, {"output": "https://team.s3.amazonaws.com/lora/?X-Amz-Signature=abcdef"}), helm=helm_version)
    assert "at '/output': value must be one of 's3://bucket/prefix/', 'file:///folder/'" in str(refused.value)
    assert "abcdef" not in str(refused.value)


def test_all_problems_are_said_together() -> None:
    with pytest.raises(RefusedError) as refused:
        whole(
            {"bloodType": "A", "bloodTypes": ["B"], "config": {"data": "x", "output": "y"}, "cronJob": {"timeZone": "Asia/Seoul"}}
        )
    for named in ("bloodType", "config.data", "config.output", "cronJob.timeZone"):
        assert f"\n{named}: " in str(refused.value)


@pytest.mark.parametrize("helm_version", ["v3", "v4"])
@pytest.mark.parametrize("values", [{}, {"bloodTypes": []}, {"bloodType": ""}, {"data": "s3://b/d/"}])
def test_no_persona_is_no_default(helm: Helm, values: Values, helm_version: Any) -> None:
    with pytest.raises(RefusedError, match="at '/bloodType': value must be one of 'A', 'B', 'O', 'AB'"):
        helm.template(values, helm=helm_version)


def every_value(values: Values, prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from every_value(value, f"{prefix}{name}.")


@pytest.mark.parametrize("dotted", [*every_value(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")))])
def test_a_value_that_is_taken_away_is_missed_or_not_needed(helm: Helm, dotted: str) -> None:
    """`null` removes a default."""
    import kubernetes_validate

    *sections, name = dotted.split(".")
    values = merged(A, {"cronJob": {"schedule": "@daily"}}) if sections == ["cronJob"] else A
    text, said = "", ""
    try:
        text = helm.template(merged(values, nested(dotted, None)))
    except RefusedError as refused:
        said = str(refused)
    if said:
        where = "".join(f"/{section}" for section in sections)
        assert f"at '{where}': missing property '{name}'" in said
        return
    for item in Manifests(text).objects:
        kubernetes_validate.validate(item, "1.37", strict=True)
    assert "null" not in text


def test_a_secret_in_a_secret_may_be_named() -> None:
    entry = {"name": "OPENAI_API_KEY", "valueFrom": {"secretKeyRef": {"name": "judge", "key": "key"}}}
    assert "OPENAI_API_KEY" in whole(merged(A, {"extraEnv": [entry]}))["job.yaml"]
