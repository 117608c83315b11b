"""Runs on Kubernetes: a JobSet (or a TrainJob of Kubeflow) of one pod per node, and what it needs beside it.

The spec goes into a ConfigMap and the runs onto a volume claim that all pods can write. Pods meet at the first one, by
the name that the JobSet's headless service gives it. A pod that fails fails its job, and the JobSet starts all pods
again, unless the exit code says that no attempt will do better. Deletion and suspension give a pod `launch.grace` to
save. Everything is done by `kubectl`, so that whatever it is set up to reach is what is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelworks.launch.engine import Job, answer
from modelworks.launch.health import needs_gpus
from modelworks.launch.submission import Submission, versions
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import dumps
from modelworks.spec.home import write_atomically
from modelworks.spec.run import RunSpec

_HOME, _SPEC, _ALIVE = "/modelworks", "/etc/modelworks", "/tmp/modelworks.alive"  # noqa: S108 - in a container
_CONTAINER = "node"  # Kubeflow's runtimes call the job and its container so as well
_RESTARTS = 1000
"""How often a JobSet may start again; attempts that bring nothing end it long before."""
_FINAL = [2, 3]
_ALIVE_S = 120
_STATUS_S = 5.0


class Kubernetes:
    """A cluster with JobSet, or with Kubeflow Trainer, installed."""

    name = "kubernetes"

    def render(self, spec: RunSpec, folder: Path) -> str:
        """The manifests, as YAML."""
        import yaml  # type: ignore[import-untyped]

        return str(yaml.safe_dump_all(manifests(spec), sort_keys=False, width=120))

    def submit(self, spec: RunSpec, folder: Path) -> Submission:
        """Apply the manifests; a job of the run that has ended is replaced."""
        wanted = manifests(spec)
        job = wanted[-1]
        submission = Submission(
            self.name,
            job["metadata"]["name"],
            versions=versions(),
            details={"namespace": spec.launch.kubernetes.namespace, "kind": job["kind"].lower()},
        )
        _kubectl(submission, "delete", submission.details["kind"], submission.job, "--ignore-not-found", "--wait")
        answer(["kubectl", "apply", "--filename", "-"], given="\n---\n".join(map(json.dumps, wanted)))
        submission.write(folder)
        return submission

    def job(self, folder: Path, submission: Submission) -> Job:
        """Where the JobSet stands, which a TrainJob has too."""
        found = _kubectl(submission, "get", "jobset", submission.job, "--ignore-not-found", "--output=json")
        if not found.strip():
            kind = submission.details["kind"]
            asked = _kubectl(submission, "get", kind, submission.job, "--ignore-not-found", "--output=name")
            return Job("waiting" if asked.strip() else "gone", f"Kubernetes has no JobSet {submission.job}")
        job = job_of(json.loads(found))
        if job.state == "running":
            self._fetch_status(folder, submission)
        return job

    def stop(self, folder: Path, submission: Submission) -> None:
        """Suspend the job: its pods are told to go, and save."""
        replace(submission, stop=True).write(folder)
        patch = json.dumps({"spec": {"suspend": True}})
        _kubectl(submission, "patch", submission.details["kind"], submission.job, "--type=merge", f"--patch={patch}")

    def log(self, folder: Path, submission: Submission, lines: int) -> str:
        """What the first pod has printed last."""
        return _kubectl(submission, "logs", _first_pod(submission), f"--container={_CONTAINER}", f"--tail={lines}")

    def _fetch_status(self, folder: Path, submission: Submission) -> None:
        """Bring the run's status here, if the first pod can be asked."""
        path = folder / "status.json"
        if path.exists() and time.time() - path.stat().st_mtime < _STATUS_S:
            return
        try:
            remote = f"{_HOME}/runs/{folder.name}/status.json"
            text = _kubectl(
                submission, "exec", _first_pod(submission), f"--container={_CONTAINER}", "--", "cat", remote
            )
            json.loads(text)
        except (OperationError, ValueError):
            return  # it has none yet
        write_atomically(path, text)


def job_of(jobset: dict[str, Any]) -> Job:
    """What a JobSet's own status says."""
    status, name = jobset.get("status", {}), jobset["metadata"]["name"]
    holds = {entry["type"]: entry for entry in status.get("conditions", []) if entry["status"] == "True"}
    restarts = f", restarted {status['restarts']} times" if status.get("restarts") else ""
    if "Completed" in holds:
        return Job("ended", f"JobSet {name} is completed{restarts}")
    if "Failed" in holds:
        return Job("failed", f"JobSet {name} has failed{restarts}: {holds['Failed'].get('message', '')}")
    if jobset["spec"].get("suspend"):
        return Job("stopped", f"JobSet {name} is suspended")
    ready = sum(entry.get("ready", 0) for entry in status.get("replicatedJobsStatus", []))
    if ready:
        return Job("running", f"JobSet {name} is running{restarts}")
    return Job("waiting", f"JobSet {name} waits for its pods{restarts}")


def manifests(spec: RunSpec) -> list[dict[str, Any]]:
    """The objects of a run, the job itself last.

    Raises
    ------
    InputError
        If no image is given.
    """
    kubernetes = spec.launch.kubernetes
    if kubernetes.image is None:
        raise InputError("launch.kubernetes.image is missing: a container image with Modelworks in it is needed")
    name = object_name(spec.name)
    labels = {"app.kubernetes.io/name": "modelworks", "app.kubernetes.io/instance": name}

    def described(suffix: str = "") -> dict[str, Any]:
        return {"name": name + suffix, "namespace": kubernetes.namespace, "labels": dict(labels)}

    objects: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": described("-spec"), "data": {"run.toml": dumps(spec)}}
    ]
    if kubernetes.claim is None:
        claim: dict[str, Any] = {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": str(kubernetes.storage)}},
        }
        if kubernetes.storage_class is not None:
            claim["storageClassName"] = kubernetes.storage_class
        objects.append(
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": described("-runs"), "spec": claim}
        )
    objects.append(
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": described(),
            # A run that loses one pod loses all: none is given up for maintenance while it trains.
            "spec": {
                "maxUnavailable": 0,
                "selector": {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": name}},
            },
        }
    )
    meta = described()
    if kubernetes.queue is not None:
        meta["labels"]["kueue.x-k8s.io/queue-name"] = kubernetes.queue
    job = _trainjob(spec, name) if kubernetes.kind == "trainjob" else _jobset(spec, name, labels)
    objects.append({"apiVersion": job["apiVersion"], "kind": job["kind"], "metadata": meta, "spec": job["spec"]})
    return objects


def object_name(run: str) -> str:
    """A run's name as Kubernetes accepts names: kept if it is one, else made one and told apart by a digest."""
    if re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", run):
        return run
    plain = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[:24].strip("-")
    return f"run-{plain}-{hashlib.sha256(run.encode()).hexdigest()[:8]}".replace("--", "-")


def _jobset(spec: RunSpec, name: str, labels: dict[str, str]) -> dict[str, Any]:
    job = {
        "parallelism": spec.nodes,
        "completions": spec.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": list(_FINAL)},
                }
            ]
        },
        "template": {"metadata": {"labels": dict(labels)}, "spec": _pod(spec, name)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": _RESTARTS,
                "restartStrategy": "BlockingRecreate",
                "rules": [
                    {"name": "finalExitCode", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [{"name": _CONTAINER, "replicas": 1, "template": {"spec": job}}],
        },
    }


def _trainjob(spec: RunSpec, name: str) -> dict[str, Any]:
    """A TrainJob whose runtime gives the JobSet; what a runtime may not say is patched in."""
    pod, kubernetes = _pod(spec, name), spec.launch.kubernetes
    container = pod["containers"][0]
    may_patch = ("serviceAccountName", "nodeSelector", "tolerations", "affinity")
    patched: dict[str, Any] = {key: pod[key] for key in may_patch if key in pod}
    patch: dict[str, Any] = {
        **patched,
        "volumes": pod["volumes"],
        "containers": [{"name": _CONTAINER, "volumeMounts": container["volumeMounts"]}],
    }
    replicated = {"name": _CONTAINER, "template": {"spec": {"template": {"spec": patch}}}}
    trainer = {
        "image": container["image"],
        "command": container["command"],
        "env": container["env"],
        "numNodes": spec.nodes,
        "resourcesPerNode": container["resources"],
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
                "name": kubernetes.runtime,
            },
            "trainer": trainer,
            "runtimePatches": [
                {
                    "manager": "modelworks.dev/train",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
                }
            ],
        },
    }


def _pod(spec: RunSpec, name: str) -> dict[str, Any]:
    kubernetes = spec.launch.kubernetes
    mounts = [
        {"name": "runs", "mountPath": _HOME},
        {"name": "spec", "mountPath": _SPEC, "readOnly": True},
        {"name": "memory", "mountPath": "/dev/shm"},  # noqa: S108 - where PyTorch's processes share tensors
    ]
    container: dict[str, Any] = {
        "name": _CONTAINER,
        "image": kubernetes.image,
        "command": ["/bin/sh", "-c", _command(spec, name)],
        "env": _variables(spec),
        "resources": _resources(spec),
        "volumeMounts": mounts,
        # Until a node has begun nothing is known of it; from then on it touches a file every few seconds.
        "startupProbe": _probe(f"test -e {_ALIVE}", period=10, failures=180),
        "livenessProbe": _probe(
            f"test $(($(date +%s) - $(stat -c %Y {_ALIVE}))) -lt {_ALIVE_S}", period=30, failures=3
        ),
        "readinessProbe": _probe(f"test -e {_ALIVE}", period=10, failures=3),
    }
    if kubernetes.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": kubernetes.secret}}]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": int(spec.launch.grace),
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": kubernetes.claim or f"{name}-runs"}},
            {"name": "spec", "configMap": {"name": f"{name}-spec"}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if kubernetes.service_account is not None:
        pod["serviceAccountName"] = kubernetes.service_account
    if kubernetes.node_selector:
        pod["nodeSelector"] = dict(kubernetes.node_selector)
    if kubernetes.tolerate:
        pod["tolerations"] = [{"key": key, "operator": "Exists"} for key in kubernetes.tolerate]
    if kubernetes.topology_key is not None:
        together = {
            "labelSelector": {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": name}},
            "topologyKey": kubernetes.topology_key,
        }
        preferred = [{"weight": 100, "podAffinityTerm": together}]
        pod["affinity"] = {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
    return pod


def _command(spec: RunSpec, name: str) -> str:
    """What a pod runs: its copy of the spec into the run's folder, the health check, and the node's part."""
    folder = shlex.quote(f"{_HOME}/runs/{spec.name}")
    meet = f"{name}-{_CONTAINER}-0-0.{name}:{spec.launch.port}"
    lines = [
        "set -e",
        f"mkdir -p {folder}",
        f'cp {_SPEC}/run.toml {folder}/.run.toml."$HOSTNAME"',
        f'mv {folder}/.run.toml."$HOSTNAME" {folder}/run.toml',
        *spec.launch.setup,
        f'python3 -m modelworks.launch.health {folder} --node "$NODE_NAME"',
        f"exec python3 -m modelworks.node_command {folder} --nodes={spec.nodes} --meet={meet} "
        f'--name="$NODE_NAME" --heartbeat={_ALIVE}',
    ]
    return "\n".join(lines)


def _variables(spec: RunSpec) -> list[dict[str, Any]]:
    def field(name: str, path: str) -> dict[str, Any]:
        return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}

    plain = {"MODELWORKS_HOME": _HOME, "PYTHONUNBUFFERED": "1", **spec.launch.environment}
    return [
        field("NODE_NAME", "spec.nodeName"),
        # A JobSet that was made anew has another id, and each of its restarts another number.
        field("JOBSET_ID", "metadata.labels['jobset.sigs.k8s.io/jobset-uid']"),
        field("JOBSET_RESTART", "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"),
        {"name": "MODELWORKS_ATTEMPT", "value": "$(JOBSET_ID).$(JOBSET_RESTART)"},
        *({"name": name, "value": value} for name, value in plain.items()),
    ]


def _resources(spec: RunSpec) -> dict[str, Any]:
    launch = spec.launch
    limits: dict[str, str] = {}
    if launch.cpus_per_node is not None:
        limits["cpu"] = str(launch.cpus_per_node)
    if launch.memory_per_node is not None:
        limits["memory"] = str(launch.memory_per_node)
    if needs_gpus(spec):
        limits[launch.kubernetes.gpu_resource] = str(spec.cluster.gpus // spec.nodes)
    return {"limits": limits, "requests": dict(limits)}


def _probe(command: str, period: int, failures: int) -> dict[str, Any]:
    return {
        "exec": {"command": ["/bin/sh", "-c", command]},
        "periodSeconds": period,
        "timeoutSeconds": 10,
        "failureThreshold": failures,
    }


def _kubectl(submission: Submission, *words: str) -> str:
    return answer(["kubectl", f"--namespace={submission.details['namespace']}", *words])


def _first_pod(submission: Submission) -> str:
    """The pod of node 0."""
    selector = f"jobset.sigs.k8s.io/jobset-name={submission.job},batch.kubernetes.io/job-completion-index=0"
    found = _kubectl(submission, "get", "pods", f"--selector={selector}", "--output=name").split()
    if not found:
        raise OperationError(f"JobSet {submission.job} has no pod now")
    return found[-1]
