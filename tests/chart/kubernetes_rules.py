"""The Kubernetes versions that the tests check manifests against, and the Pod Security profile "restricted"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

VERSIONS: Final = ("1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
_VOLUMES: Final = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def violations(pod: dict[str, Any]) -> Iterator[str]:
    """Yield each way in which a pod violates the "restricted" profile of the Kubernetes Pod Security Standards."""
    spec = pod["spec"]
    own = spec.get("securityContext", {})
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield name
    yield from (f"volume {volume['name']}" for volume in spec["volumes"] if set(volume) - {"name"} - _VOLUMES)
    if "windowsOptions" in own or own.get("sysctls"):
        yield "windows or sysctls"
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        context = container.get("securityContext", {})
        both = {**own, **context}
        yield from (
            f"{container['name']}: {problem}"
            for problem, holds in {
                "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is False,
                "privileged": not context.get("privileged"),
                "capabilities.drop": "ALL" in context.get("capabilities", {}).get("drop", []),
                "capabilities.add": set(context.get("capabilities", {}).get("add", [])) <= {"NET_BIND_SERVICE"},
                "runAsNonRoot": both.get("runAsNonRoot") is True,
                "runAsUser": both.get("runAsUser") != 0,
                "seccompProfile": both.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
                "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
                "procMount": context.get("procMount", "Default") == "Default",
            }.items()
            if not holds
        )
