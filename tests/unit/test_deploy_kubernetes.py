"""Kubernetes manifests: valid against the API's schemas, and consistent with each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.deploy import DEPLOY, documents, stages
from tests.manifests import API, kustomize, pod, validate

validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate from the test extra")
KUBERNETES = DEPLOY / "kubernetes"
MANIFESTS = [
    path for folder in (KUBERNETES, DEPLOY / "ray") for path in sorted(folder.rglob("*.yaml"))
    if path.name != "kustomization.yaml" and not path.name.startswith("serve") and path.parent.name != "gpu"
]  # fmt: skip


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_manifest_is_yaml_of_a_known_api(path: Path) -> None:
    for manifest in documents(path):
        assert {"apiVersion", "kind", "metadata", "spec"} >= set(manifest)


@pytest.mark.parametrize("name", ["base", "gpu", "production"])
def test_rendered_manifests_fit_their_schemas(name: str) -> None:
    validate(kustomize(KUBERNETES / name).values())


def test_jobs_are_on_a_volume_of_one_server(tmp_path: Path) -> None:
    """The component over the base: the folder that the server is told of is the volume, and only one pod has it."""
    (tmp_path / "kustomization.yaml").write_text("resources: [base]\ncomponents: [jobs]\n")
    for name in ("base", "jobs"):
        shutil.copytree(KUBERNETES / name, tmp_path / name)
    rendered = kustomize(tmp_path)
    validate(rendered.values())
    deployment = rendered["Deployment/slipstream"]
    assert (deployment["spec"]["strategy"], deployment["spec"]["replicas"]) == ({"type": "Recreate"}, 1)
    (server,) = pod(deployment)["containers"]
    environment = {e["name"]: e["value"] for e in server["env"]}
    mounts = {m["mountPath"]: m["name"] for m in server["volumeMounts"]}
    volumes = {v["name"]: v for v in pod(deployment)["volumes"]}
    claim = volumes[mounts[environment["SLIPSTREAM_DATA_DIR"]]]["persistentVolumeClaim"]["claimName"]
    assert f"PersistentVolumeClaim/{claim}" in rendered


def test_validator_would_notice() -> None:
    (deployment,) = documents(KUBERNETES / "base/deployment.yaml")
    deployment["spec"]["selector"] = {"matchLabels": {"a": "b"}}
    deployment["spec"]["template"]["metadata"] = {"labels": {"a": "b"}}
    validate([deployment])
    pod(deployment)["containers"][0]["readynessProbe"] = {}
    with pytest.raises(validator.ValidationError, match="readynessProbe"):
        validate([deployment])


def test_grace_is_longer_than_the_longest_request() -> None:
    (deployment,) = documents(KUBERNETES / "base/deployment.yaml")
    (server,) = pod(deployment)["containers"]
    env = {entry["name"]: int(entry["value"]) for entry in server["env"]}
    before = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert env["SLIPSTREAM_DEADLINE_SECONDS"] < env["SLIPSTREAM_DRAIN_SECONDS"]
    assert before + env["SLIPSTREAM_DRAIN_SECONDS"] < pod(deployment)["terminationGracePeriodSeconds"]


def test_user_and_writable_places_are_those_of_the_image() -> None:
    image = dict(stages()["server"])
    (deployment,) = documents(KUBERNETES / "base/deployment.yaml")
    (server,) = pod(deployment)["containers"]
    security = pod(deployment)["securityContext"]
    assert image["USER"] == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert server["securityContext"]["readOnlyRootFilesystem"] is True
    assert {image["VOLUME"], "/tmp"} == {mount["mountPath"] for mount in server["volumeMounts"]}


def test_production_is_a_gpu_server_watched_and_scaled() -> None:
    parts = kustomize(KUBERNETES / "production")
    (server,) = pod(parts["Deployment/slipstream"])["containers"]
    assert server["image"] == "slipstream:cuda"
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"
    labels = parts["Deployment/slipstream"]["spec"]["template"]["metadata"]["labels"]
    assert parts["PodMonitor/slipstream"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert parts["Service/slipstream"]["spec"]["selector"].items() <= labels.items()
    assert parts["NetworkPolicy/slipstream"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    ports = {port["name"] for port in server["ports"]}
    assert {end["port"] for end in parts["PodMonitor/slipstream"]["spec"]["podMetricsEndpoints"]} <= ports
    assert parts["ScaledObject/slipstream"]["spec"]["scaleTargetRef"]["name"] == "slipstream"
    assert "PrometheusRule/slipstream" in parts
    assert "ConfigMap/slipstream-dashboard" in parts


def test_kuberay_gets_the_local_serve_file() -> None:
    service = kustomize(DEPLOY / "ray")["RayService/slipstream"]
    assert service["spec"]["serveConfigV2"] == (DEPLOY / "ray/serve.yaml").read_text()
    cluster = service["spec"]["rayClusterConfig"]
    store = {"secretKeyRef": {"name": "slipstream-jobs", "key": "url", "optional": True}}
    for (container,) in (group["template"]["spec"]["containers"] for group in cluster["workerGroupSpecs"]):
        assert {"name": "SLIPSTREAM_JOBS_URL", "valueFrom": store} in container["env"], "replicas share one store"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        template = {**group["template"], "metadata": {"name": "pod"}}
        validator.validate({"apiVersion": "v1", "kind": "Pod", **template}, API, strict=True)
