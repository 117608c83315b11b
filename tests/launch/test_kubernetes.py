"""Manifests, held against the published schemas of Kubernetes, JobSet and Kubeflow Trainer."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelworks.launch.kubernetes import Kubernetes, job_of, manifests, object_name
from modelworks.spec.errors import InputError
from modelworks.spec.files import loads_run, run_from
from modelworks.spec.run import RunSpec
from modelworks.train_command import with_layout

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
trainer_api = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")

VERSION = "1.37"
FULL = {
    "time": "1d",
    "cpus_per_node": 96,
    "memory_per_node": "1TiB",
    "environment": {"NCCL_DEBUG": "WARN"},
    "setup": ["ulimit -l unlimited"],
    "kubernetes": {
        "image": "registry.example/modelworks:1",
        "namespace": "training",
        "storage": "10TiB",
        "storage_class": "shared",
        "queue": "team-a",
        "topology_key": "topology.kubernetes.io/rack",
        "node_selector": {"gpu": "h100"},
        "tolerate": ["nvidia.com/gpu"],
        "service_account": "trainer",
        "secret": "object-store",
    },
}
LEAST = {"kubernetes": {"image": "modelworks:1"}}


def _run(launch: dict[str, Any], kind: str = "jobset", name: str = "big") -> RunSpec:
    launch = {**launch, "kubernetes": {**launch["kubernetes"], "kind": kind}}
    cluster = {"preset": "h100-superpod", "gpus": 64}
    return run_from(
        {
            "name": name,
            "model": {"preset": "grok-tiny"},
            "train": {"global_batch": 64},
            "cluster": cluster,
            "launch": launch,
        }
    )


def _by_kind(spec: RunSpec) -> dict[str, dict[str, Any]]:
    read = list(yaml.safe_load_all(Kubernetes().render(spec, Path("nowhere"))))
    assert read == manifests(spec), "YAML gives back what it was made from"
    return {entry["kind"]: entry for entry in read}


def _without_empty(value: Any) -> Any:
    """A model writes fields that are unset as empty; both say the same."""
    if isinstance(value, dict):
        return {key: _without_empty(inner) for key, inner in value.items() if inner is not None}
    return [_without_empty(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("launch", [FULL, LEAST], ids=["full", "least"])
@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_every_object_of_kubernetes_own_fits_its_schema(launch: dict[str, Any], kind: str) -> None:
    objects = _by_kind(_run(launch, kind))
    assert set(objects) == {
        "ConfigMap",
        "PersistentVolumeClaim",
        "PodDisruptionBudget",
        {"jobset": "JobSet", "trainjob": "TrainJob"}[kind],
    }
    for name, entry in objects.items():
        if name not in ("JobSet", "TrainJob"):
            kubernetes_validate.validate(entry, VERSION, strict=True)


@pytest.mark.parametrize("launch", [FULL, LEAST], ids=["full", "least"])
def test_the_job_in_a_jobset_fits_the_schema_of_a_job(launch: dict[str, Any]) -> None:
    jobset = _by_kind(_run(launch))["JobSet"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": replicated["template"]["spec"]}
    kubernetes_validate.validate(job, VERSION, strict=True)


@pytest.mark.parametrize("launch", [FULL, LEAST], ids=["full", "least"])
@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_no_field_of_the_job_is_unknown_to_its_custom_resource(launch: dict[str, Any], kind: str) -> None:
    model = {"jobset": trainer_api.JobsetV1alpha2JobSetSpec, "trainjob": trainer_api.TrainerV1alpha1TrainJobSpec}[kind]
    spec = manifests(_run(launch, kind))[-1]["spec"]
    # A field that the model doesn't know is not given back.
    assert _without_empty(model.from_dict(spec).to_dict()) == spec


def test_a_field_that_is_misspelt_is_found_by_these_checks() -> None:
    objects = _by_kind(_run(FULL))
    budget = objects["PodDisruptionBudget"]
    budget["spec"]["maxUnavailble"] = budget["spec"].pop("maxUnavailable")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(budget, VERSION, strict=True)
    spec = objects["JobSet"]["spec"]
    spec["failurePolicy"]["maxRestart"] = spec["failurePolicy"].pop("maxRestarts")
    assert _without_empty(trainer_api.JobsetV1alpha2JobSetSpec.from_dict(spec).to_dict()) != spec
    patched = manifests(_run(FULL, "trainjob"))[-1]["spec"]
    (replicated,) = patched["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    pod["nodeSelectors"] = pod.pop("nodeSelector")
    assert _without_empty(trainer_api.TrainerV1alpha1TrainJobSpec.from_dict(patched).to_dict()) != patched


def test_the_pods_get_the_spec_the_devices_and_the_meeting_point() -> None:
    spec = _run(FULL)
    objects = _by_kind(spec)
    assert loads_run(objects["ConfigMap"]["data"]["run.toml"]) == spec
    (replicated,) = objects["JobSet"]["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 8
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"cpu": "96", "memory": str(2**40), "nvidia.com/gpu": "8"}
    # The name that a JobSet's headless service gives pod 0 of job 0 of the replicated job "node".
    assert "--meet=big-node-0-0.big:29400" in container["command"][-1]
    assert "--nodes=8" in container["command"][-1]
    assert pod["terminationGracePeriodSeconds"] == 180
    assert pod["restartPolicy"] == "Never"
    claim = next(volume for volume in pod["volumes"] if volume["name"] == "runs")
    assert claim["persistentVolumeClaim"]["claimName"] == objects["PersistentVolumeClaim"]["metadata"]["name"]
    assert objects["JobSet"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"


def test_the_command_of_a_pod_runs_in_a_shell_up_to_the_node_program(tmp_path: Path) -> None:
    """With the folders that a container has put elsewhere, and a program that stands in for Python."""
    spec = _run(LEAST, name="shell")
    pod = manifests(spec)[-1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"][-1]
    command = command.replace("/etc/modelworks", str(tmp_path / "etc")).replace("/modelworks/", f"{tmp_path}/home/")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "run.toml").write_text("name = 'shell'\n")
    said = tmp_path / "python3"
    said.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    said.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOSTNAME": "pod-0", "NODE_NAME": "host-7"}
    subprocess.run(["/bin/sh", "-c", command], env=environment, check=True)
    assert (tmp_path / "home" / "runs" / "shell" / "run.toml").read_text() == "name = 'shell'\n"
    health, node = (tmp_path / "said").read_text().splitlines()
    assert health.split()[:2] == ["-m", "modelworks.launch.health"]
    assert node.split()[:2] == ["-m", "modelworks.node_command"]
    assert "--name=host-7" in node


def test_a_claim_that_exists_is_used_and_none_is_made() -> None:
    launch = {"kubernetes": {"image": "modelworks:1", "claim": "ours"}}
    objects = _by_kind(_run(launch))
    assert "PersistentVolumeClaim" not in objects
    pod = objects["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "ours"}} in pod["volumes"]


@pytest.mark.parametrize("name", ["big", "Grok.2_large", "7b", "a" * 64, "x-", "A" * 64])
def test_any_run_gets_a_name_that_kubernetes_accepts_for_its_pods(name: str) -> None:
    import re

    made = object_name(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", made)
    assert len(f"{made}-node-0-99999") <= 63


def test_different_runs_have_different_names() -> None:
    names = ["big", "Big", "BIG", "b.ig", "b_ig", "a" * 64, "a" * 63]
    assert len({object_name(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("status", "suspend", "state"),
    [
        ({}, False, "waiting"),
        ({"replicatedJobsStatus": [{"name": "node", "ready": 0, "active": 1}]}, False, "waiting"),
        ({"replicatedJobsStatus": [{"name": "node", "ready": 1}], "restarts": 2}, False, "running"),
        ({"conditions": [{"type": "Suspended", "status": "True"}]}, True, "stopped"),
        ({"conditions": [{"type": "Completed", "status": "True"}]}, False, "ended"),
        ({"conditions": [{"type": "Failed", "status": "True", "message": "why"}]}, False, "failed"),
        ({"conditions": [{"type": "Failed", "status": "False"}]}, False, "waiting"),
    ],
)
def test_a_jobsets_status_says_where_the_run_stands(status: dict[str, Any], suspend: bool, state: str) -> None:
    job = job_of({"metadata": {"name": "big"}, "spec": {"suspend": suspend}, "status": status})
    assert job.state == state
    assert "big" in job.words


def test_without_an_image_the_field_is_named() -> None:
    with pytest.raises(InputError, match=r"launch\.kubernetes\.image is missing"):
        manifests(_run({"kubernetes": {}}))


def test_a_dry_run_writes_the_manifests_to_a_file(
    typed: Callable[..., subprocess.CompletedProcess[str]], home: Path, tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    out = tmp_path / "big.yaml"
    done = typed("train", write_run(_run(LEAST)), "--on", "kubernetes", "--dry-run", "--out", out)
    assert done.returncode == 0, done.stderr
    run = _run(LEAST)
    assert list(yaml.safe_load_all(out.read_text())) == manifests(with_layout(run, device=run.cluster.device))
    assert not (home / "runs").exists()
