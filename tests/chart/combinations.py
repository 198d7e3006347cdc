"""Thirty ways to use the chart: the examples in ci/, and combinations that the examples do not cover."""

from __future__ import annotations

from typing import Final

from chart.chart_helm import Values, examples, merged

OWN: Final[Values] = {"data": "s3://my-bucket/personas/", "output": "s3://my-bucket/lora/"}
A: Final[Values] = {"bloodType": "A", **OWN}
ALL: Final[Values] = {"bloodTypes": ["A", "B", "O", "AB"], **OWN}
DIGEST: Final = f"sha256:{'0123456789abcdef' * 4}"

COMBINATIONS: Final[dict[str, Values]] = {
    **examples(),
    "the command of the README": {"bloodType": "A"},
    "a Job each": ALL,
    "all in one, at night": merged(ALL, {"jobs": "shared", "cronJob": {"schedule": "@daily"}}),
    "nightly, suspended, replaced": merged(
        ALL, {"cronJob": {"schedule": "30 2 * * 1-5", "timeZone": "Asia/Seoul", "suspend": True, "concurrencyPolicy": "Replace"}}
    ),
    "nightly, through Kueue": merged(A, {"cronJob": {"schedule": "@weekly"}, "kueue": {"queueName": "night"}}),
    "Kueue, a Job each": merged(ALL, {"kueue": {"queueName": "personas"}, "jobLabels": {"team": "voice"}}),
    "keys and a token from Secrets": merged(
        A, {"s3": {"existingSecret": "keys", "region": "eu-central-1"}, "hfToken": {"existingSecret": "hub"}}
    ),
    "a digest, private registry": merged(
        A, {"image": {"digest": DIGEST, "pullSecrets": ["registry"], "pullPolicy": "IfNotPresent"}}
    ),
    "every volume a new claim": merged(
        ALL,
        {
            name: {"createClaim": True, "storageClassName": "nfs", "accessMode": "ReadWriteMany"}
            for name in ("workVolume", "modelCache", "compileCache")
        },
    ),
    "every volume a claim of one's own": merged(
        A, {name: {"existingClaim": name.lower()} for name in ("workVolume", "modelCache", "compileCache")}
    ),
    "the user of OpenShift": merged(A, {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}}),
    "another user": merged(A, {"podSecurityContext": {"runAsUser": 12345, "runAsGroup": 0, "supplementalGroups": [5000]}}),
    "a deleted Job after a day": merged(A, {"ttlSecondsAfterFinished": 86400, "backoffLimit": 0}),
    "a GPU that the CPU job asks for": merged(A, {"device": "cpu", "gpu": {"enabled": True}}),
    "a GPU that nobody asks for": merged(A, {"gpu": {"enabled": False}, "runtimeClassName": "nvidia"}),
    "no service account of its own": merged(A, {"serviceAccount": {"create": False, "name": "there-already"}}),
    "a proxy": merged(
        A,
        {
            "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.internal:3128"}],
            "extraEnvFrom": [{"secretRef": {"name": "trackers", "optional": True}}],
            "networkPolicy": {"ports": [3128], "cidrs": ["10.0.0.0/8", "fd00::/8"]},
        },
    ),
    "more egress": merged(
        A,
        {
            "networkPolicy": {
                "extraEgress": [
                    {
                        "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "mlflow"}}}],
                        "ports": [{"protocol": "TCP", "port": 5000}],
                    }
                ]
            }
        },
    ),
    "data on a volume": merged(
        A,
        {
            "data": "file:///personas/",
            "output": "file:///results/",
            "extraVolumes": [
                {"name": "personas", "configMap": {"name": "personas"}},
                {"name": "results", "persistentVolumeClaim": {"claimName": "results"}},
            ],
            "extraVolumeMounts": [
                {"name": "personas", "mountPath": "/personas", "readOnly": True},
                {"name": "results", "mountPath": "/results"},
            ],
        },
    ),
    "settings of every kind": merged(
        A,
        {
            "config": {
                "strict": True,
                "lora": {"r": 32, "alpha": 64, "target_modules": ["q_proj", "v_proj"]},
                "training": {"epochs": 0.5, "learning_rate": 0.0000001, "max_steps": None},
                "evaluation": {"intensities": [0, 0.5, 1], "batch_size": 60},
                "gates": {"persona": None, "win_rate": 0},
                "memory": {"micro_batch_tokens": 1048576, "gradient_checkpointing": "on"},
                "checkpoints": {"grace_s": 100, "every_minutes": 1440},
                "limits": {"decompressed_bytes": 1099511627776},
                "logging": {"report_to": ["mlflow"], "level": "debug"},
            }
        },
    ),
    "placed by all means": merged(
        ALL,
        {
            "nodeSelector": {"accelerator": "h100"},
            "affinity": {
                "podAntiAffinity": {
                    "preferredDuringSchedulingIgnoredDuringExecution": [
                        {
                            "weight": 1,
                            "podAffinityTerm": {
                                "topologyKey": "kubernetes.io/hostname",
                                "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "persona-train"}},
                            },
                        }
                    ]
                }
            },
            "topologySpreadConstraints": [
                {
                    "maxSkew": 1,
                    "topologyKey": "topology.kubernetes.io/zone",
                    "whenUnsatisfiable": "ScheduleAnyway",
                    "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "persona-train"}},
                }
            ],
            "priorityClassName": "training",
            "podAnnotations": {"karpenter.sh/do-not-disrupt": "true"},
            "podLabels": {"azure.workload.identity/use": "true"},
        },
    ),
}
