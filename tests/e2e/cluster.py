"""Test chart and image on KUBECONFIG's cluster, with the tiny base and an S3 server on this machine.

    python tests/e2e/cluster.py --image localhost/lora-trainer:cpu --s3-host 172.17.0.1

Install, wait, interrupt, upgrade and uninstall as a user would, in a separate namespace. Exit with 1 at the first failure. Always
delete the namespace unless `--keep` is given. The nodes must have the image (`make image-cpu`) or be able to pull it. `--s3-host`
is an address of this machine that pods can reach, such as Docker's or kind's bridge. One node must offer exactly one
`nvidia.com/gpu`, real or not, because the test expects a second persona to wait for it:

    kubectl patch node NODE --subresource=status --type=json \\
      -p '[{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": "1"}]'

Uses the `helm` program if there is one, otherwise Helm's library from locks/chart.txt.

"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "charts" / "persona-train"
BUCKET = "persona-cluster"
S3_KEYS = "s3-keys"
GPU = "nvidia.com/gpu"

sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools")]

Values = dict[str, Any]


class WrongError(Exception):
    """The cluster did not behave as expected."""


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def expect(is_so: object, otherwise: object) -> None:
    """Raise `WrongError` with `otherwise` unless `is_so`."""
    if not is_so:
        raise WrongError(otherwise)


# -- helm -------------------------------------------------------------------------------------------------


class Helm:
    """Install, upgrade, test and uninstall. Raises `RefusedError` with Helm's message."""

    class RefusedError(Exception):
        pass

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._binary = shutil.which("helm")
        if self._binary:
            self.version = self._run("version", "--short").strip()
            return
        # Append, because the chart's environment has other versions of packages that this process uses.
        sys.path.extend(map(str, REPOSITORY.glob(".venv-chart/lib/python3*/site-packages")))
        try:
            library = importlib.import_module("helm_python")
        except ImportError:
            raise WrongError("neither helm nor its library is there: install Helm, or run make chart-lint once") from None
        # Helm stores its releases in a namespace.
        self._library = library.Config(kubeconfig_path=os.environ.get("KUBECONFIG"), namespace=namespace)
        self._error: type[Exception] = library.HelmError
        self.version = str(library.helm_sdk_version())

    def install(self, release: str, values: Values) -> None:
        if self._binary:
            self._with_values("install", release, values)
        else:
            self._call(lambda: self._library.install(str(CHART), release, values))

    def upgrade(self, release: str, values: Values) -> None:
        if self._binary:
            self._with_values("upgrade", release, values)
        else:
            self._call(lambda: self._library.upgrade(str(CHART), release, values))

    def test(self, release: str) -> None:
        if self._binary:
            self._run("test", release, "--namespace", self._namespace, "--timeout", "5m")
        else:
            self._call(lambda: self._library.test(release, timeout=300))

    def uninstall(self, release: str) -> None:
        if self._binary:
            self._run("uninstall", release, "--namespace", self._namespace)
        else:
            self._call(lambda: self._library.uninstall(release))

    def _with_values(self, verb: str, release: str, values: Values) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(values, file)
            file.flush()
            self._run(verb, release, str(CHART), "--namespace", self._namespace, "--values", file.name)

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([str(self._binary), *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise self.RefusedError(done.stderr)
        return done.stdout

    def _call(self, ask: Callable[[], object]) -> None:
        try:
            ask()
        except self._error as error:
            raise self.RefusedError(str(error)) from error


# -- kubectl ----------------------------------------------------------------------------------------------


class Cluster:
    """kubectl in one namespace."""

    def __init__(self, namespace: str) -> None:
        self._kubectl = [shutil.which("kubectl") or "kubectl", "--namespace", namespace]

    def run(self, *arguments: str, is_checked: bool = True) -> str:
        done = subprocess.run([*self._kubectl, *arguments], capture_output=True, text=True, check=False)
        expect(done.returncode == 0 or not is_checked, f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def objects(self, kinds: str, release: str = "") -> list[dict[str, Any]]:
        selector = ["--selector", f"app.kubernetes.io/instance={release}"] if release else []
        found: list[dict[str, Any]] = json.loads(self.run("get", kinds, "--output", "json", *selector))["items"]
        return found

    def job(self, release: str) -> dict[str, Any]:
        """Return the only Job of a release."""
        jobs = self.objects("jobs", release)
        expect(len(jobs) == 1, f"{release}: got {len(jobs)} Jobs, expected one")
        return jobs[0]

    def pods(self, release: str) -> list[dict[str, Any]]:
        """Return the trainer pods, oldest first."""
        pods = [
            pod
            for pod in self.objects("pods", release)
            if pod["metadata"]["labels"].get("app.kubernetes.io/component") == "trainer"
        ]
        return sorted(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def names(self, release: str) -> list[str]:
        return [pod["metadata"]["name"] for pod in self.pods(release)]

    def log(self, pod: str) -> list[dict[str, Any]]:
        """Return a pod's log events. Skips lines that are not JSON."""
        events = []
        for line in self.run("logs", pod, "--container", "trainer", is_checked=False).splitlines():
            with suppress(ValueError):
                events.append(json.loads(line))
        return events

    def follow(self, *arguments: str) -> subprocess.Popen[str]:
        """Start kubectl with its output on a pipe."""
        return subprocess.Popen([*self._kubectl, *arguments], stdout=subprocess.PIPE, text=True)

    def wait(self, what: str, is_so: Callable[[], Any], limit_s: float = 300) -> Any:
        """Poll `is_so` until its result is true, and return the result."""
        ends_s = time.monotonic() + limit_s
        while not (found := is_so()):
            if time.monotonic() > ends_s:
                raise WrongError(
                    f"{what}: not within {limit_s:g} s\n{self.run('get', 'jobs,pods', '--output', 'wide', is_checked=False)}"
                )
            time.sleep(0.5)
        return found

    def wait_for_job(self, release: str, limit_s: float = 600) -> str:
        """Wait until the release's Job ends. Return `Complete` or `Failed`."""

        def ended() -> str:
            conditions = self.job(release)["status"].get("conditions", [])
            return next((c["type"] for c in conditions if c["status"] == "True" and c["type"] in ("Complete", "Failed")), "")

        return str(self.wait(f"the Job of {release} ends", ended, limit_s))


def terminated(pod: dict[str, Any]) -> dict[str, Any]:
    """Return the terminated state of a pod's trainer, or an empty dict while it runs."""
    statuses = pod["status"].get("containerStatuses", [])
    ended: dict[str, Any] = next((status["state"].get("terminated", {}) for status in statuses if status["name"] == "trainer"), {})
    return ended


# -- storage ----------------------------------------------------------------------------------------------


@contextmanager
def reachable(port: int, host: str) -> Iterator[int]:
    """Forward a port of `host` to `port` on loopback, and yield its number. The server there accepts any credentials."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    with socket.create_server((host, 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]


def put_files(storage: Any, broken: str) -> None:
    """Upload data for three personas, broken data for a fourth, and the tiny base."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("A", "B", "AB"):
            path = Path(scratch) / f"{name}.jsonl"
            lines = (REPOSITORY / "data" / f"train_data_type_{name}.jsonl").read_bytes().splitlines(keepends=True)
            path.write_bytes(b"".join(lines[:48]))
            storage.upload(path, f"data/train_data_type_{name}.jsonl")
    storage.write_bytes(f"data/train_data_type_{broken}.jsonl", b'{"instruction": "half a rec\n')
    for path in sorted((REPOSITORY / "examples" / "tiny-base").iterdir()):
        storage.upload(path, f"tiny-base/{path.name}")
    storage.upload(REPOSITORY / "tests" / "assets" / "few_prompts.jsonl", "prompts/few_prompts.jsonl")


# -- the test --------------------------------------------------------------------------------------------


class Story:
    """The steps of the test, in order. Each must succeed."""

    def __init__(self, cluster: Cluster, helm: Helm, storage: Any, common: Values) -> None:
        self.cluster, self.helm, self.storage, self.common = cluster, helm, storage, common
        self.said: list[dict[str, Any]] = []

    def tell(self, what: str, step: Callable[[], str]) -> None:
        started_s = time.monotonic()
        say(f"{what} ...")
        seen = step()
        took_s = round(time.monotonic() - started_s, 1)
        self.said.append({"what": what, "seen": seen, "took_s": took_s})
        say(f"  ok, {took_s:.1f} s: {seen}")

    def values(self, **more: Any) -> Values:
        """Return the values that all releases share, with `more` and its `config` merged in."""
        merged = {**self.common, **more}
        merged["config"] = {**self.common["config"], **more.get("config", {})}
        return merged

    def refused(self, named: str, values: Values) -> str:
        """Check that Helm refuses `values` with a message that contains `named`."""
        try:
            self.helm.install("refused", values)
        except Helm.RefusedError as error:
            expect(named in str(error), f"refused without a word of {named}: {error}")
            expect(not self.cluster.objects("jobs,configmaps,serviceaccounts", "refused"), "something was installed all the same")
            return next(line.strip() for line in str(error).splitlines() if named in line)
        raise WrongError(f"Helm took values that it should refuse for {named}")

    def bad_values(self) -> str:
        seen = [
            self.refused("bloodType", self.values()),
            self.refused("bloodType", self.values(bloodType="C")),
            self.refused("learning_rat", self.values(bloodType="A", config={"training": {"learning_rat": 1}})),
            self.refused("replicas", self.values(bloodType="A", replicas=2)),
        ]
        return " | ".join(line[:110] for line in seen)

    def two_personas(self) -> str:
        """Check that A gets the GPU and that B waits for it."""
        self.helm.install("train-a", self.values(bloodType="A"))
        self.cluster.wait("A runs", lambda: self.phase("train-a") == "Running")
        self.helm.install("train-b", self.values(bloodType="B"))
        condition = self.cluster.wait("B is looked at", lambda: self.unschedulable("train-b"))
        expect(GPU in condition, f"B waits for something else: {condition}")
        expect(self.cluster.wait_for_job("train-a") == "Complete", self.last_words("train-a"))
        expect(self.cluster.wait_for_job("train-b") == "Complete", self.last_words("train-b"))
        return f"B: {condition}"

    def adapters(self) -> str:
        from lora_trainer.store.manifest import verify_files

        seen = []
        for persona in ("A", "B"):
            latest = self.storage.read_bytes(f"lora/adapters/{persona}/latest.json")
            expect(latest, f"{persona}: no latest.json")
            run_id = json.loads(latest.data)["run_id"]
            prefix = f"lora/adapters/{persona}/{run_id}/"
            problems = verify_files(self.storage, prefix)
            expect(not problems, problems)
            seen.append(f"{prefix}: {len(list(self.storage.list(prefix)))} objects")
        left = [found.key for found in self.storage.list("lora/runs/") if not found.key.endswith("/starts.json")]
        expect(not left, f"left over: {left}")
        return ", ".join(seen)

    def storage_check(self) -> str:
        self.helm.test("train-a")
        return "helm test succeeded"

    def upgrades(self) -> str:
        before = self.cluster.job("train-a")["metadata"]
        self.helm.upgrade("train-a", self.values(bloodType="A"))
        same = self.cluster.job("train-a")["metadata"]
        expect(same["uid"] == before["uid"], "an upgrade without a change made another Job")
        self.helm.upgrade("train-a", self.values(bloodType="A", podAnnotations={"changed": "yes"}))
        other = self.cluster.wait(
            "there is one Job", lambda: len(self.cluster.objects("jobs", "train-a")) == 1
        ) and self.cluster.job("train-a")
        expect(other["metadata"]["name"] != before["name"], "an upgrade with a change made no other Job")
        expect(self.cluster.wait_for_job("train-a") == "Complete", self.last_words("train-a"))
        finished = self.event("train-a", "run_finished")
        expect(finished.get("already_done"), f"the same run was done again: {finished}")
        return f"{before['name']}, then {other['metadata']['name']}, which found its run done"

    def shared_pod(self) -> str:
        config = {"training": {**self.common["config"]["training"], "max_steps": 4}}
        self.helm.install("train-both", self.values(bloodTypes=["A", "B"], jobs="shared", config=config))
        expect(self.cluster.wait_for_job("train-both") == "Complete", self.last_words("train-both"))
        expect(len(self.cluster.pods("train-both")) == 1, "got several pods")
        personas = self.event("train-both", "run_finished").get("personas", [])
        expect([persona["outcome"] for persona in personas] == ["done", "done"], f"the last word was {personas}")
        expect(self.event("train-both", "base_reused"), "the base was loaded twice")
        return ", ".join(f"{persona['blood_type']}: {persona['bundle']}" for persona in personas)

    def broken_data(self) -> str:
        self.helm.install("train-o", self.values(bloodType="O", backoffLimit=0))
        expect(self.cluster.wait_for_job("train-o") == "Failed", "a Job with broken data completed")
        ended = terminated(self.cluster.pods("train-o")[0])
        expect(ended["exitCode"] == 3, f"got exit {ended['exitCode']}, expected 3")
        word = json.loads(ended["message"])
        expect(word["exit_code"] == 3, f"the termination message says {word}")
        expect(word["problems"][0].startswith(f"s3://{BUCKET}/data/train_data_type_O.jsonl:1: "), word["problems"])
        return f"exit 3: {word['problems'][0][:120]}"

    def interrupted(self) -> str:
        """Delete a pod during training. It must exit with 143, and the next pod must resume."""
        steps = 60
        config = {
            "training": {**self.common["config"]["training"], "max_steps": steps, "epochs": 40},
            "checkpoints": {"every_steps": 4, "grace_s": 45},
        }
        self.helm.install("train-ab", self.values(bloodType="AB", config=config))
        self.cluster.wait("AB has a pod", lambda: self.cluster.pods("train-ab"))
        first = self.cluster.pods("train-ab")[0]["metadata"]["name"]
        self.cluster.wait("there is a checkpoint", lambda: self.event("train-ab", "checkpoint_uploaded"), 400)
        # Follow both from now on: deleting a pod also deletes its log and exit code.
        log = self.cluster.follow("logs", "--follow", first)
        exit_code = "{.status.containerStatuses[0].state.terminated.exitCode}"
        states = self.cluster.follow("get", "pod", first, "--watch", "--output", f"jsonpath={exit_code}{{'\\n'}}")
        self.cluster.run("delete", "pod", first, "--wait=false")
        self.cluster.wait("the deleted pod is gone", lambda: first not in self.cluster.names("train-ab"), 120)
        states.terminate()
        codes = set(states.communicate()[0].split())
        expect(codes == {"143"}, f"kubectl showed exit {codes}")
        events = [json.loads(line) for line in log.communicate()[0].splitlines() if line.startswith("{")]
        words = {line["event"]: line for line in events}
        expect(words.get("run_finished", {}).get("exit_code") == 143, f"the last word was {events[-1:]}")
        safe = words["interrupted_safely"]
        expect(self.cluster.wait_for_job("train-ab") == "Complete", self.last_words("train-ab"))
        resumed = self.event("train-ab", "resumed")
        expect(resumed.get("step") == safe["step"], f"got {resumed}, expected to go on from step {safe['step']}")
        expect(self.event("train-ab", "training_finished")["steps"] == steps, "not all steps were trained")
        return f"143 at step {safe['step']} of {steps} (so says kubectl, and the last word), resumed there, done"

    def nothing_left(self) -> str:
        releases = ("train-a", "train-b", "train-both", "train-o", "train-ab")
        for release in releases:
            self.helm.uninstall(release)
        kinds = "jobs,cronjobs,pods,configmaps,secrets,serviceaccounts,networkpolicies,persistentvolumeclaims"

        def left() -> list[str]:
            found = [item for release in releases for item in self.cluster.objects(kinds, release)]
            found += [item for item in self.cluster.objects("secrets") if item["type"] == "helm.sh/release.v1"]
            return [f"{item['kind']}/{item['metadata']['name']}" for item in found]

        self.cluster.wait("all is gone", lambda: not left(), 120)
        return f"{len(releases)} releases, nothing left of them"

    # -- helpers for one release

    def phase(self, release: str) -> str:
        pods = self.cluster.pods(release)
        return str(pods[-1]["status"]["phase"]) if pods else ""

    def unschedulable(self, release: str) -> str:
        pods = self.cluster.pods(release)
        conditions = pods[-1]["status"].get("conditions", []) if pods else []
        return next((str(c.get("message", "")) for c in conditions if c["type"] == "PodScheduled" and c["status"] == "False"), "")

    def event(self, release: str, name: str) -> dict[str, Any]:
        """Return the last event with this name in the newest pod's log, or an empty dict."""
        pods = self.cluster.pods(release)
        log = self.cluster.log(pods[-1]["metadata"]["name"]) if pods else []
        return next((line for line in reversed(log) if line.get("event") == name), {})

    def last_words(self, release: str) -> str:
        return "\n".join(f"{pod['metadata']['name']}: {terminated(pod)}" for pod in self.cluster.pods(release))


def common_values(arguments: argparse.Namespace, endpoint: str) -> Values:
    """Return values for a short run on the tiny base that requests the GPU without using it."""
    from lora_trainer.config import GatesConfig

    repository, _, tag = arguments.image.rpartition(":")
    return {
        "image": {"repository": repository, "tag": tag, "pullPolicy": "IfNotPresent"},
        "device": "cpu",
        "gpu": {"enabled": True, "resource": GPU},
        "s3": {"endpoint": endpoint, "region": "us-east-1", "existingSecret": S3_KEYS},
        "data": f"s3://{BUCKET}/data/",
        "output": f"s3://{BUCKET}/lora/",
        "baseModel": {"id": "lora-trainer/tiny-base", "s3Uri": f"s3://{BUCKET}/tiny-base/"},
        "resources": {
            "requests": {"cpu": "250m", "memory": "1Gi", "ephemeral-storage": "1Gi"},
            "limits": {"cpu": "2", "memory": "4Gi", "ephemeral-storage": "8Gi"},
        },
        "terminationGracePeriodSeconds": 60,
        "config": {
            "training": {
                "quantization": "none", "compute_dtype": "float32", "max_steps": 6, "sequences_per_step": 8,
                "learning_rate": 0.0015,
            },
            "lora": {"r": 8, "alpha": 8},
            "evaluation": {
                "prompts": f"s3://{BUCKET}/prompts/few_prompts.jsonl", "max_new_tokens": 16, "intensities": [0.5],
                "bootstrap_resamples": 100,
            },
            # A few steps do not teach a persona, so turn all gates off.
            "gates": dict.fromkeys(GatesConfig.model_fields),
        },
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", required=True, help="with its tag: localhost/lora-trainer:cpu")
    parser.add_argument("--s3-host", required=True, help="an address of this machine that pods reach")
    parser.add_argument("--namespace", default="lora-trainer-e2e")
    parser.add_argument("--keep", action="store_true", help="leave the namespace")
    parser.add_argument("--out", type=Path, help="JSON with what was seen")
    arguments = parser.parse_args()
    if shutil.which("kubectl") is None:
        parser.error("kubectl is not installed")
    dev_s3 = importlib.import_module("dev_s3")
    cluster = Cluster(arguments.namespace)
    server_version = json.loads(cluster.run("version", "--output", "json"))["serverVersion"]["gitVersion"]
    with dev_s3.serve() as server, reachable(int(server.endpoint_url.rpartition(":")[2]), arguments.s3_host) as port:
        os.environ |= server.environment
        server.make_bucket(BUCKET)
        from lora_trainer.store.opening import open_storage

        storage = open_storage(f"s3://{BUCKET}/")
        put_files(storage, broken="O")
        cluster.run("create", "namespace", arguments.namespace)
        cluster.run("label", "namespace", arguments.namespace, "pod-security.kubernetes.io/enforce=restricted")
        try:
            keys = [f"--from-literal={name}={server.environment[name]}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
            cluster.run("create", "secret", "generic", S3_KEYS, *keys)
            helm = Helm(arguments.namespace)
            say(f"Kubernetes {server_version}, Helm {helm.version}, {arguments.image}")
            story = Story(cluster, helm, storage, common_values(arguments, f"http://{arguments.s3_host}:{port}"))
            story.tell("Bad values are refused by name", story.bad_values)
            story.tell("One persona trains, the second one waits for the GPU, then trains", story.two_personas)
            story.tell("Both adapters are in S3, and every file is what its manifest says", story.adapters)
            story.tell("helm test reads the data and tries the output with the job's identity", story.storage_check)
            story.tell("An upgrade without a change does nothing, one with a change makes a new Job", story.upgrades)
            story.tell("One pod trains two personas on one base", story.shared_pod)
            story.tell("Broken data ends with exit 3 and a termination message", story.broken_data)
            story.tell("A pod deleted in mid-training ends with 143, the next one goes on", story.interrupted)
            story.tell("Uninstalling leaves nothing", story.nothing_left)
        except (WrongError, Helm.RefusedError) as wrong:
            say(f"WRONG: {wrong}")
            return 1
        finally:
            if not arguments.keep:
                cluster.run("delete", "namespace", arguments.namespace, "--wait=false")
    if arguments.out:
        document = {"kubernetes": server_version, "helm": helm.version, "image": arguments.image, "steps": story.said}
        arguments.out.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
