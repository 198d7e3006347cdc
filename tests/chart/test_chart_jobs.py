"""Test the Jobs: their names, differences between Kubernetes versions, and values that interact."""

from __future__ import annotations

import itertools
import re
from typing import Any, Final

import pytest

from chart.chart_helm import REPOSITORY, Helm, Manifests, Values, merged, whole

A: Final[Values] = {"bloodType": "A"}
ALL: Final = ["A", "B", "O", "AB"]


def render(helm: Helm, values: Values, /, **options: Any) -> Manifests:
    return Manifests(helm.template(values, **options))


# -- names ----------------------------------------------------------------------------------------------


def test_a_job_each(helm: Helm) -> None:
    jobs = render(helm, {"bloodTypes": ALL}).jobs
    assert [re.sub("[0-9a-f]{10}$", "…", name) for name in jobs] == [f"persona-train-{name}-…" for name in ("a", "b", "o", "ab")]
    arguments = [job["template"]["spec"]["containers"][0]["args"] for job in jobs.values()]
    assert [options[2] for options in arguments] == [f"--blood-type={blood_type}" for blood_type in ALL]


def test_one_job_for_all(helm: Helm) -> None:
    rendered = render(helm, {"bloodTypes": ALL, "jobs": "shared"})
    (name,) = rendered.jobs
    assert re.fullmatch("persona-train-a-b-o-ab-[0-9a-f]{10}", name)
    assert rendered.trainer["args"][2] == "--blood-type=A,B,O,AB"


RELEASES: Final = (
    "a",
    "persona-train",
    "x" * 53,
    "x" * 52 + "y",
    "a.b",
    "a-b",
    "a" * 43,
    "a" * 44,
    "1.2-3",
    "a" * 33 + "-" * 5 + "b" * 15,
)


def test_names_are_short_enough_and_no_two_are_the_same(helm: Helm) -> None:
    settings: tuple[Values, ...] = (
        *({"bloodType": blood_type} for blood_type in ALL),
        {"bloodTypes": ["A", "B"], "jobs": "shared"},
        {"bloodTypes": ALL, "jobs": "shared"},
    )
    for schedule in ("", "@daily"):
        names = [
            name
            for release, values in itertools.product(RELEASES, settings)
            for name in render(helm, merged(values, {"cronJob": {"schedule": schedule}}), release=release).jobs
        ]
        assert len(set(names)) == len(names) == len(RELEASES) * len(settings)
        # A Job's name becomes a label of its pods, and a CronJob appends eleven characters to the names of its Jobs.
        assert max(map(len, names)) <= (52 if schedule else 63)
        assert all(re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) for name in names)


def test_objects_of_two_releases_have_their_own_names(helm: Helm) -> None:
    claims = {name: {"createClaim": True} for name in ("workVolume", "modelCache", "compileCache")}
    objects = [
        (item["kind"], item["metadata"]["name"])
        for release in RELEASES
        for item in render(helm, merged(A, claims), release=release).objects
    ]
    assert len(set(objects)) == len(objects)


def test_another_setting_is_another_job_with_a_settings_file_of_its_own(helm: Helm) -> None:
    before, after = render(helm, A), render(helm, merged(A, {"config": {"training": {"epochs": 4}}}))
    assert before.jobs.keys() != after.jobs.keys()
    # The old Job's pod still mounts its own settings file.
    assert before.one("ConfigMap")["metadata"]["name"] != after.one("ConfigMap")["metadata"]["name"]
    assert after.one("ConfigMap")["immutable"] is True
    assert (
        after.one("ConfigMap")["metadata"]["name"]
        == after.one("Job")["spec"]["template"]["spec"]["volumes"][0]["configMap"]["name"]
    )


def test_one_persona_more_leaves_the_others_alone(helm: Helm) -> None:
    assert render(helm, {"bloodTypes": ["A", "B"]}).jobs.items() <= render(helm, {"bloodTypes": ["A", "B", "O"]}).jobs.items()
    assert render(helm, A).jobs.items() <= render(helm, {"bloodTypes": ["A", "B"]}).jobs.items()


def test_names_of_digits_alone_are_names(helm: Helm) -> None:
    """YAML would parse such names as numbers if they were not quoted."""
    import kubernetes_validate

    claims = {name: {"existingClaim": "123"} for name in ("workVolume", "modelCache", "compileCache")}
    values = merged(
        A,
        claims,
        {
            "image": {"pullSecrets": ["1"], "tag": "20"},
            "s3": {"existingSecret": "2", "region": "3"},
            "caBundle": {"configMap": "4", "key": "5"},
            "baseModel": {"existingClaim": "6", "path": "7"},
            "kueue": {"queueName": "8"},
            "priorityClassName": "9",
            "runtimeClassName": "10",
        },
    )
    for more in (
        {},
        {
            "caBundle": {"configMap": "", "secret": "11"},
            "modelCache": {"createClaim": True, "existingClaim": "", "storageClassName": "12"},
        },
    ):
        rendered = render(helm, merged(values, more), release="123", namespace="456")
        for item in [
            *rendered.objects,
            *Manifests(whole(merged(values, more), release="123", namespace="456")["tests/check-storage.yaml"]).objects,
        ]:
            kubernetes_validate.validate(item, "1.37", strict=True)


def test_labels_of_ones_own_do_not_take_a_pod_out_of_its_policy(helm: Helm) -> None:
    own = {"app.kubernetes.io/instance": "other", "app.kubernetes.io/name": "other", "team": "voice"}
    labels = render(helm, merged(A, {"podLabels": own, "jobLabels": own})).one("Job")["spec"]["template"]["metadata"]["labels"]
    assert (
        labels.items()
        >= {"app.kubernetes.io/instance": "persona-train", "app.kubernetes.io/name": "persona-train", "team": "voice"}.items()
    )


def test_a_new_version_of_the_chart_alone_makes_no_new_job(helm: Helm) -> None:
    labels = render(helm, A).one("Job")["spec"]["template"]["metadata"]["labels"]
    assert not {"helm.sh/chart", "app.kubernetes.io/version"} & labels.keys()
    assert {"helm.sh/chart", "app.kubernetes.io/version"} <= render(helm, A).one("Job")["metadata"]["labels"].keys()


# -- Kubernetes versions -----------------------------------------------------------------------------------------

NIGHTLY: Final = {"bloodType": "A", "cronJob": {"schedule": "0 3 * * *", "timeZone": "Asia/Seoul"}}


@pytest.mark.parametrize("helm_version", ["v3", "v4"])
@pytest.mark.parametrize(
    ("kube", "policy", "empty_conditions", "cronjob", "zone"),
    [
        ("1.20.2", False, False, "batch/v1beta1", False),
        ("1.21.0", False, False, "batch/v1", False),
        ("1.24.17", False, False, "batch/v1", False),
        ("1.25.0", False, False, "batch/v1", True),
        ("1.26.0", True, True, "batch/v1", True),
        ("1.28.9-eks-036c24b", True, True, "batch/v1", True),
        ("1.29.0-gke.100", True, False, "batch/v1", True),
        ("1.37.0", True, False, "batch/v1", True),
    ],
)
def test_fields_that_a_version_does_not_know_are_left_out(
    helm: Helm, helm_version: Any, kube: str, policy: bool, empty_conditions: bool, cronjob: str, zone: bool
) -> None:
    job = render(helm, A, helm=helm_version, kube=kube).one("Job")["spec"]
    assert ("podFailurePolicy" in job) is policy
    if policy:
        assert [rule.get("onPodConditions") == [] for rule in job["podFailurePolicy"]["rules"]] == [
            empty_conditions,
            empty_conditions,
            False,
        ]
    nightly = render(helm, NIGHTLY, helm=helm_version, kube=kube).one("CronJob")
    assert nightly["apiVersion"] == cronjob
    assert ("timeZone" in nightly["spec"]) is zone
    assert ("podFailurePolicy" in nightly["spec"]["jobTemplate"]["spec"]) is policy


# Fields of Jobs, pods and containers that Kubernetes added after 1.20.
NEWER_THAN_1_20: Final = {
    "podFailurePolicy", "podReplacementPolicy", "successPolicy", "managedBy", "completionMode", "suspend", "backoffLimitPerIndex",
    "maxFailedIndexes", "hostUsers", "os", "schedulingGates", "resourceClaims", "resizePolicy", "restartPolicyRules", "timeZone",
    "subPathExpr", "matchLabelKeys", "minDomains", "nodeAffinityPolicy", "nodeTaintsPolicy", "appArmorProfile", "setHostnameAsFQDN",
    "supplementalGroupsPolicy",
}  # fmt: skip


def test_for_1_20_there_is_nothing_newer(helm: Helm) -> None:
    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value) | set().union(*(keys(part) for part in value.values()))
        return set().union(*(keys(part) for part in value)) if isinstance(value, list) else set()

    everything = merged(
        {"bloodTypes": ALL}, {"ttlSecondsAfterFinished": 60, "modelCache": {"createClaim": True}, "kueue": {"queueName": "q"}}
    )
    assert keys(render(helm, everything, kube="1.20.2").objects) & NEWER_THAN_1_20 == set()
    assert "podFailurePolicy" in keys(render(helm, everything).objects)


def test_a_cluster_that_is_too_old_is_refused(helm: Helm) -> None:
    with pytest.raises(Exception, match="kubeVersion"):
        helm.template(A, kube="1.19.16")


# -- failures -------------------------------------------------------------------------------------------


def test_the_failure_policy_is_the_table_of_exit_codes(helm: Helm) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    table = readme.split("<!-- exit-codes:begin -->")[1].split("<!-- exit-codes:end -->")[0]
    codes = {int(code): retry for code, retry in re.findall(r"^\| (\d+) \|.*\| (no|may help|) ?\|$", table, re.MULTILINE)}
    assert codes.keys() == {0, 1, 2, 3, 4, 5, 6, 7, 143}
    policy = render(helm, A).one("Job")["spec"]["podFailurePolicy"]
    assert policy == {
        "rules": [
            {
                "action": "FailJob",
                "onExitCodes": {
                    "containerName": "trainer",
                    "operator": "In",
                    "values": sorted(code for code, retry in codes.items() if retry == "no"),
                },
            },
            {"action": "Ignore", "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [143]}},
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        ]
    }


@pytest.mark.parametrize(("seconds", "grace_s"), [(10, 8), (30, 23), (60, 45), (100, 75), (120, 90), (300, 270), (86400, 86370)])
def test_the_last_checkpoint_ends_before_the_pod(helm: Helm, seconds: int, grace_s: int) -> None:
    assert render(helm, merged(A, {"terminationGracePeriodSeconds": seconds})).settings == {"checkpoints": {"grace_s": grace_s}}


def test_a_grace_of_ones_own(helm: Helm) -> None:
    own = {"config": {"checkpoints": {"grace_s": 100, "keep": 3}}}
    assert render(helm, merged(A, own)).settings == {"checkpoints": {"grace_s": 100, "keep": 3}}
    assert render(helm, merged(A, {"config": {"checkpoints": {"keep": 3}}})).settings == {"checkpoints": {"grace_s": 90, "keep": 3}}


# -- several values together ----------------------------------------------------------------------------


def test_a_variable_of_ones_own_replaces_the_charts(helm: Helm) -> None:
    own = [{"name": "HF_HOME", "value": "/mine"}, {"name": "AWS_REGION", "value": "eu-west-1"}]
    rendered = render(helm, merged(A, {"s3": {"region": "us-east-1"}, "extraEnv": own}))
    assert [rendered.environment[entry["name"]] for entry in own] == own


@pytest.mark.parametrize(
    ("base", "offline"), [({}, False), ({"s3Uri": "s3://bucket/x/"}, True), ({"existingClaim": "c", "path": "x"}, True)]
)
def test_the_hub_is_asked_only_for_what_comes_from_it(helm: Helm, base: Values, offline: bool) -> None:
    rendered = render(helm, merged(A, {"baseModel": base}))
    assert ("HF_HUB_OFFLINE" in rendered.environment) is offline


def test_the_digest_is_what_the_manifest_of_an_adapter_records(helm: Helm) -> None:
    digest = f"sha256:{'0' * 64}"
    assert "IMAGE_DIGEST" not in render(helm, A).environment
    assert render(helm, merged(A, {"image": {"digest": digest}})).environment["IMAGE_DIGEST"]["value"] == digest


@pytest.mark.parametrize(
    ("device", "enabled", "asks"),
    [("cuda", "auto", True), ("cpu", "auto", False), ("cpu", True, True), ("cuda", False, False)],
)
def test_who_asks_for_a_gpu(helm: Helm, device: str, enabled: object, asks: bool) -> None:
    resources = render(helm, merged(A, {"device": device, "gpu": {"enabled": enabled}})).trainer["resources"]
    # The quantity must be a string, because server-side apply rejects a number.
    expected = "1" if asks else None
    assert [resources[kind].get("nvidia.com/gpu") for kind in ("requests", "limits")] == [expected, expected]


def test_every_folder_that_is_written_to_is_a_volume(helm: Helm) -> None:
    rendered = render(helm, A)
    mounts = {mount["mountPath"]: mount for mount in rendered.trainer["volumeMounts"]}
    for entry in rendered.environment.values():
        if entry["value"].startswith("/"):
            assert any(entry["value"].startswith(f"{path}/") and path != "/cache" for path in mounts), entry
    (cache,) = [option for option in rendered.trainer["args"] if "cache_dir" in option]
    assert cache == "--set=base.cache_dir=/cache/models/mirrors"
    assert {f"/{place}" for place in ("job", "tmp", "cache", "cache/models", "cache/compiled", "dev/shm")} <= mounts.keys()
    assert {mount["name"] for mount in mounts.values()} == {
        volume["name"] for volume in rendered.one("Job")["spec"]["template"]["spec"]["volumes"]
    }


def test_a_claim_of_the_release(helm: Helm) -> None:
    own = {"createClaim": True, "size": "77Gi", "accessMode": "ReadWriteMany"}
    values = merged(
        A, {"workVolume": own, "modelCache": {**own, "storageClassName": "nfs"}, "compileCache": {"existingClaim": "mine"}}
    )
    rendered = render(helm, values)
    asked = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "77Gi"}}}
    assert {item["metadata"]["name"]: item["spec"] for item in rendered.of_kind("PersistentVolumeClaim")} == {
        # Omit the class to get the cluster's default; an empty string would disable it.
        "persona-train-work": asked,
        "persona-train-models": {**asked, "storageClassName": "nfs"},
    }
    volumes = {volume["name"]: volume for volume in rendered.one("Job")["spec"]["template"]["spec"]["volumes"]}
    assert [volumes[name]["persistentVolumeClaim"]["claimName"] for name in ("work", "models", "compiled")] == [
        "persona-train-work",
        "persona-train-models",
        "mine",
    ]


def egress(helm: Helm, values: Values) -> list[tuple[list[Any], list[int]]]:
    rules = render(helm, merged(A, values)).one("NetworkPolicy")["spec"]["egress"]
    return [(rule.get("to", []), [port["port"] for port in rule.get("ports", [])]) for rule in rules]


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [("http://minio.storage.svc:9000", 9000), ("https://minio:9443/", 9443), ("http://minio", 80), ("https://s3.internal", 443)],
)
def test_the_port_of_the_endpoint_may_be_reached(helm: Helm, endpoint: str, port: int) -> None:
    dns, cluster, outside = egress(helm, {"s3": {"endpoint": endpoint}})
    assert dns == ([], [53, 53])
    assert cluster == ([{"namespaceSelector": {}}], [port])
    assert outside[1] == sorted({443, port}, key=[443, port].index)


def test_without_an_endpoint_only_443(helm: Helm) -> None:
    assert egress(helm, {"networkPolicy": {"cidrs": ["10.0.0.0/8"]}}) == [
        ([], [53, 53]),
        ([{"ipBlock": {"cidr": "10.0.0.0/8"}}], [443]),
    ]
    assert egress(helm, {"networkPolicy": {"cidrs": []}}) == [([], [53, 53])]


def test_nothing_comes_in(helm: Helm) -> None:
    spec = render(helm, A).one("NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["ingress"] == []


def test_the_policy_is_for_the_trainer_and_the_check(helm: Helm) -> None:
    selected = render(helm, A).one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items()
    check = Manifests(whole(A)["tests/check-storage.yaml"]).one("Pod")
    for labels in (render(helm, A).one("Job")["spec"]["template"]["metadata"]["labels"], check["metadata"]["labels"]):
        assert selected <= labels.items()


def test_kueue_gets_its_label_and_nothing_else(helm: Helm) -> None:
    """Kueue suspends and admits Jobs itself; every upgrade would apply a rendered `suspend` again."""
    job = render(helm, merged(A, {"kueue": {"queueName": "personas"}})).one("Job")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "personas"
    assert "suspend" not in job["spec"]
    nightly = render(helm, merged(NIGHTLY, {"kueue": {"queueName": "personas"}})).one("CronJob")
    assert nightly["spec"]["jobTemplate"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "personas"
    assert "kueue.x-k8s.io/queue-name" not in nightly["metadata"]["labels"]


# -- helm test and the notes ----------------------------------------------------------------------------


def test_the_check_has_the_jobs_identity_settings_and_image(helm: Helm) -> None:
    values = merged(
        {"bloodTypes": ["A", "AB"]},
        {
            "s3": {"endpoint": "https://minio:9000", "existingSecret": "keys"},
            "caBundle": {"configMap": "company"},
            "image": {"pullSecrets": ["registry"]},
            "baseModel": {"existingClaim": "bases"},
            "podLabels": {"azure.workload.identity/use": "true"},
            "podAnnotations": {"a/b": "c"},
            "extraEnvFrom": [{"secretRef": {"name": "more"}}],
            "extraVolumes": [{"name": "more", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
        },
    )
    check = Manifests(whole(values)["tests/check-storage.yaml"]).one("Pod")
    pod = next(iter(render(helm, values).jobs.values()))["template"]
    (mine,), (theirs,) = check["spec"]["containers"], pod["spec"]["containers"]
    for name in ("image", "imagePullPolicy", "env", "envFrom", "securityContext"):
        assert mine[name] == theirs[name], name
    for name in ("serviceAccountName", "imagePullSecrets", "securityContext", "automountServiceAccountToken", "enableServiceLinks"):
        assert check["spec"][name] == pod["spec"][name], name
    assert mine["args"][0] == "check-storage"
    assert mine["args"][2] == "--blood-type=A,AB"
    assert set(mine["args"][3:]) <= set(theirs["args"])
    assert [mount for mount in mine["volumeMounts"] if mount not in theirs["volumeMounts"]] == []
    assert [volume for volume in check["spec"]["volumes"] if volume not in pod["spec"]["volumes"]] == []
    assert check["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert "hook-succeeded" in check["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
    assert "nvidia.com/gpu" not in mine["resources"]["limits"]


def test_the_notes_name_what_is_there(helm: Helm) -> None:
    values = {"bloodTypes": ["A", "AB"], "output": "s3://mine/lora/", "data": "s3://mine/data/"}
    notes = whole(values)["NOTES.txt"]
    for name in render(helm, values, kube="1.36.0").jobs:
        assert f"logs -f -c trainer job/{name}\n" in notes
        assert f"exec -c trainer job/{name} -- sh -c 'tail -n +1 /job/runs/*/*/progress.json'" in notes
    assert "s3://mine/lora/adapters/AB/latest.json" in notes
    assert "kubectl -n personas " in notes
    assert "helm -n personas test persona-train" in notes
    assert "143 interrupted" in notes
    assert "default, lora-trainer" not in notes


def test_the_notes_of_a_schedule() -> None:
    notes = whole({"bloodType": "B", "cronJob": {"schedule": "0 3 * * *", "timeZone": "Asia/Seoul"}})["NOTES.txt"]
    assert "0 3 * * * (Asia/Seoul)" in notes
    assert "kubectl -n personas create job --from=cronjob/persona-train-b persona-train-b-now" in notes


def test_the_notes_warn_of_a_bucket_that_anybody_may_own() -> None:
    assert "the chart's default, lora-trainer" in whole(A)["NOTES.txt"]
    assert "the chart's default, lora-trainer" not in whole(merged(A, {"s3": {"endpoint": "http://minio:9000"}}))["NOTES.txt"]
