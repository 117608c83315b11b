"""The examples that operators copy: each is read by what will read it, or held against its schema."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelworks.cli import app
from modelworks.serve.config import load_config
from modelworks.serve.metrics import Metrics
from modelworks.serve.routing import Router

EXAMPLES = Path(__file__).parents[2] / "examples"
DEPLOY = EXAMPLES / "deploy"
KUBERNETES = "1.37"


def options_of(command: str) -> set[str]:
    """The options that one of our commands takes."""
    import typer

    return {name for option in typer.main.get_command(app).commands[command].params for name in option.opts}  # type: ignore[attr-defined]


def test_the_configuration_is_one() -> None:
    config = load_config(DEPLOY / "serve.toml")
    assert config.retention.conversations == 90 * 86400
    assert set(config.models["assistant"].on or {}) == set(config.engines)


def test_nginx_reads_its_configuration(tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if nginx is None:
        pytest.skip("there is no nginx on this machine; Debian's package is nginx-light")
    certificate, key = tmp_path / "fullchain.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    made += ["-subj", "/CN=chat.example.org", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    text = (DEPLOY / "nginx.conf").read_text()
    # Names are looked up when it is read, and the certificate is opened; nothing else is changed.
    text = re.sub(r"gateway-\d\.example\.org", "127.0.0.1", text)
    text = text.replace("/etc/nginx/tls/fullchain.pem", str(certificate)).replace("/etc/nginx/tls/key.pem", str(key))
    (tmp_path / "nginx.conf").write_text(f"pid {tmp_path}/nginx.pid;\nerror_log {tmp_path}/error.log;\n{text}")
    words = [nginx, "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr


@pytest.mark.parametrize("name", ["gateway.yaml", "vllm.yaml"])
def test_manifests_hold_against_the_schemas_of_kubernetes(name: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    manifests = list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))
    assert len(manifests) >= 3
    for manifest in manifests:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_the_gateways_in_the_manifests_are_started_with_options_that_there_are_and_end_in_time() -> None:
    manifests = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "gateway.yaml").read_text()))
    pod = manifests[0]["spec"]["template"]["spec"]
    arguments = pod["containers"][0]["args"]
    assert {word.partition("=")[0] for word in arguments[1:]} <= options_of("serve")
    given_s = pod["terminationGracePeriodSeconds"] - pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert load_config(DEPLOY / "serve.toml").drain_s < given_s
    engines = {"app": "vllm"}
    stateful = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "vllm.yaml").read_text()))[1]
    assert stateful["spec"]["template"]["metadata"]["labels"] == engines
    names = {f"vllm-{number}.{stateful['spec']['serviceName']}" for number in range(stateful["spec"]["replicas"])}
    urls = {engine.url for engine in load_config(DEPLOY / "serve.toml").engines.values()}
    assert urls == {f"http://{name}:8000/v1" for name in names}


def test_the_compose_file_is_whole() -> None:
    """Its own program isn't Debian's to give; what can go wrong in it is looked at by hand."""
    composed: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services, volumes = composed["services"], set(composed["volumes"])
    for name, service in services.items():
        assert ("image" in service) != ("build" in service), name
        assert set(service.get("depends_on", {})) <= set(services), name
        named = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert {volume for volume in named if not volume.startswith(".")} <= volumes, name
    gateway = services["gateway"]
    assert (DEPLOY / gateway["build"]["context"] / gateway["build"]["dockerfile"]).is_file()
    words = gateway["command"]
    assert {word for word in words if word.startswith("--")} <= options_of(words[0])
    aliases = set(services["vllm"]["networks"]["default"]["aliases"])
    urls = {engine.url for engine in load_config(DEPLOY / "serve.toml").engines.values()}
    assert urls == {f"http://{alias}:8000/v1" for alias in aliases}
    docker = shutil.which("docker")
    if docker is not None and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0:
        environment = {**os.environ, "POSTGRES_PASSWORD": "x"}
        words = [docker, "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "-q"]
        subprocess.run(words, check=True, env=environment)


async def test_every_metric_of_the_dashboard_exists() -> None:
    dashboard = json.loads((EXAMPLES / "grafana" / "modelworks.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = set(re.findall(r"\bmodelworks_\w+", " ".join(expressions)))
    assert len(named) >= 10
    router = Router(load_config(DEPLOY / "serve.toml"))
    from modelworks.serve.fairness import FairQueue

    page = Metrics(router, FairQueue(router.capacity)).page().decode()
    typed = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE))
    known = set(typed) | {f"{name}_bucket" for name, kind in typed.items() if kind == "histogram"}
    assert named <= known, named - known
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    await router.close()
