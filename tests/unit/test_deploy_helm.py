"""The Helm chart: rendered by Helm's own engine, valid for the API's schemas, and the same server as kustomize's.

The settings in it reach the server as they were meant, and what does not go together is refused by name.
"""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml

from app.metrics import Metrics
from app.settings import Settings
from tests import docs
from tests.deploy import DEPLOY, ROOT
from tests.manifests import by_name, kustomize, pod, validate

helm = pytest.importorskip("helm_python", reason="needs helm-python-sdk from the test extra")
CHART = DEPLOY / "helm" / "slipstream"
PRODUCTION = yaml.safe_load((CHART / "production.yaml").read_text())
SECRET = {"name": "keys", "apiKeys": "api", "adminKey": "admin", "hfToken": "hub"}
DIGEST = f"sha256:{'a1' * 32}"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "production": PRODUCTION,
    "volumes": {
        "cache": {"persistent": True, "storageClass": "fast", "size": "7Gi"},
        "data": {"enabled": True},
        "models": {"existingClaim": "mine"},
        "settings": {"model": ["/models/a", "shapes-dit"]},
    },
    "ingress": {
        "ingress": {"enabled": True, "hosts": ["a.example.com", "b.example.com"], "trustedProxies": "10.0.0.0/8"}
    },
    "documented": yaml.safe_load(re.findall(r"```yaml\n(.*?)```", (docs.PAGES / "operations.md").read_text(), re.S)[0]),
    "placed": {
        "autoscaling": {"kind": "hpa", "maxReplicas": 5},
        "gpu": {"count": 2, "runtimeClassName": "nvidia"},
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "spot", "operator": "Exists"}],
        "topologySpread": [
            {"topologyKey": zone, "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"} for zone in ("zone", "host")
        ],
        "image": {"repository": "registry.example.com/x", "digest": DIGEST, "pullSecrets": ["pull"]},
        "networkPolicy": {"egress": [{"ports": [{"port": 5432}]}], "fromNamespaces": []},
        "podAnnotations": {"a": "1"},
        "priorityClassName": "high",
        "secret": SECRET,
        "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
    },
}  # fmt: skip


def templates(values: dict[str, Any], name: str = "slipstream") -> dict[str, str]:
    """What Helm makes of each template, in the namespace `pictures`; an image's name is added where there is none."""
    with helm.Chart.load(CHART) as chart:
        whole = {"image": {"repository": "slipstream"}, **values}
        files: dict[str, str] = chart.render(whole, name=name, namespace="pictures")
    return {path.rpartition("/")[2]: text for path, text in files.items()}


def render(values: dict[str, Any], name: str = "slipstream") -> dict[str, Any]:
    """The manifests by kind and name."""
    return by_name("\n---\n".join(text for file, text in templates(values, name).items() if file != "NOTES.txt"))


def server(parts: dict[str, Any], name: str = "slipstream") -> dict[str, Any]:
    """The container of the server."""
    (container,) = pod(parts[f"Deployment/{name}"])["containers"]
    out: dict[str, Any] = container
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_chart_is_linted_and_fits_the_schemas(variant: str) -> None:
    report = helm.lint(CHART, {"image": {"repository": "slipstream"}, **VARIANTS[variant]}, strict=True)
    assert [m["error"] for m in report["messages"] if m["severity"] > 1] == report["errors"] == []
    parts = render(VARIANTS[variant])
    assert {"Deployment/slipstream", "Service/slipstream", "NetworkPolicy/slipstream"} <= parts.keys()
    validate(parts.values())


@pytest.mark.parametrize(("folder", "values"), [("base", {}), ("production", PRODUCTION)], ids=["base", "production"])
def test_it_is_the_server_that_kustomize_makes(folder: str, values: dict[str, Any]) -> None:
    ours, theirs = render(values), kustomize(DEPLOY / "kubernetes" / folder)
    assert ours.keys() == theirs.keys() - {"Namespace/slipstream"}
    deployments = [parts["Deployment/slipstream"] for parts in (ours, theirs)]
    mine, other = map(pod, deployments)
    assert mine.pop("topologySpreadConstraints")[0]["topologyKey"] == "kubernetes.io/hostname"
    assert mine["containers"][0].pop("imagePullPolicy") == "IfNotPresent"
    assert other["containers"][0].pop("envFrom")[0]["secretRef"]["optional"]
    assert mine == other
    assert deployments[0]["spec"]["strategy"] == deployments[1]["spec"]["strategy"]
    rules = [parts["NetworkPolicy/slipstream"]["spec"] for parts in (ours, theirs)]
    assert [(r["ingress"], r["egress"]) for r in rules[:1]] == [(r["ingress"], r["egress"]) for r in rules[1:]]
    if folder == "production":
        scalers = [parts["ScaledObject/slipstream"]["spec"] for parts in (ours, theirs)]
        assert scalers[0]["advanced"] == scalers[1]["advanced"]
        assert scalers[0]["fallback"] == scalers[1]["fallback"]
        assert [t["metadata"]["threshold"] for t in scalers[0]["triggers"]] == ["8", "15"]
        assert ours["PrometheusRule/slipstream"]["spec"] == theirs["PrometheusRule/slipstream"]["spec"]
        boards = [
            parts["ConfigMap/slipstream-dashboard"]["data"]["slipstream.json"].strip() for parts in (ours, theirs)
        ]
        assert boards[0] == boards[1]


def test_settings_reach_the_server_as_they_were_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large numbers keep their digits, lists become what the environment takes."""
    settings = {
        "model": ["shapes-dit", "/models/my one"],
        "max_waiting_bytes": 5 * 2**30,
        "store_bytes": 2**43 + 1,
        "max_rows": "auto",
        "keep_days": 0.25,
        "drain_seconds": 130.5,
        "deadline_seconds": 130,
        "compile": True,
        "offload_text_encoders": False,
        "device": "cuda:1",
    }
    parts = render({"settings": settings})
    for entry in server(parts)["env"]:
        monkeypatch.setenv(entry["name"], entry["value"])
    got = Settings()
    assert {name: getattr(got, name) for name in settings} == {**settings, "model": tuple(settings["model"])}  # type: ignore[arg-type]
    assert pod(parts["Deployment/slipstream"])["terminationGracePeriodSeconds"] >= 10 + 131


def test_schema_has_the_settings_of_the_code_and_no_secret() -> None:
    text = (CHART / "values.schema.json").read_text()
    assert docs.chart(text) == text, "python -m tests.docs writes it"
    secrets = {"api_keys", "admin_key", "jobs_url", "webhook_secret"}
    listed = yaml.safe_load(text)["properties"]["settings"]["properties"].keys()
    assert listed == Settings.model_fields.keys() - secrets - {"host", "port", "data_dir"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image": {"repository": ""}}, r"image\.repository is empty\. No image is published: build one"),
        ({"image": {"repository": "x", "digest": "sha256:12"}}, "/image/digest"),
        ({"settings": {"max_rwos": 4}}, "additional properties 'max_rwos' not allowed"),
        ({"settings": {"max_steps": 0}}, "/settings/max_steps.*minimum: got 0, want 1"),
        ({"settings": {"api_keys": "abc"}}, "'api_keys' not allowed"),
        ({"settings": {"cors_origins": ["https://a,https://b"]}}, "/settings/cors_origins/0"),
        ({"settings": {"deadline_seconds": 125}}, r"drain_seconds \(125\) has to be above .*deadline_seconds \(125\)"),
        ({"settings": {"drain_seconds": 0}}, r"drain_seconds \(0\) has to be above"),
        ({"replicas": 2, "data": {"enabled": True}}, r"data\.enabled: one server has the store"),
        ({"autoscaling": {"kind": "hpa"}, "cache": {"persistent": True}}, "not ReadWriteMany"),
        ({"autoscaling": {"kind": "keda", "minReplicas": 9}}, "minReplicas is above"),
        ({"secret": {"apiKeys": "a"}}, r"secret\.name is empty"),
        ({"secret": {"name": "a"}}, "none of its keys"),
        ({"settings": {"metrics_require_key": True}, "podMonitor": {"enabled": True}}, r"podMonitor\.authorization"),
        ({"ingress": {"enabled": True}}, r"hosts in ingress\.hosts"),
        ({"replica": 2}, "additional properties 'replica' not allowed"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:60],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(helm.HelmError, match=f"(?s){said}"):
        render(values)


def test_volumes_of_one_server() -> None:
    parts = render(VARIANTS["volumes"])
    assert parts["Deployment/slipstream"]["spec"]["strategy"] == {"type": "Recreate"}
    mounts = {m["name"]: m for m in server(parts)["volumeMounts"]}
    claims = {
        v["name"]: v["persistentVolumeClaim"]
        for v in pod(parts["Deployment/slipstream"])["volumes"]
        if v["name"] != "tmp"
    }
    assert {name: claim["claimName"] for name, claim in claims.items()} == {
        "cache": "slipstream-cache", "data": "slipstream-data", "models": "mine",
    }  # fmt: skip
    assert mounts["models"]["readOnly"]
    environment = {e["name"]: e["value"] for e in server(parts)["env"]}
    assert environment["SLIPSTREAM_DATA_DIR"] == mounts["data"]["mountPath"]
    assert environment["SLIPSTREAM_MODEL"] == "/models/a,shapes-dit"
    cache = parts["PersistentVolumeClaim/slipstream-cache"]["spec"]
    assert (cache["storageClassName"], cache["resources"]["requests"]["storage"]) == ("fast", "7Gi")
    assert "PersistentVolumeClaim/slipstream-data" in parts
    shared = {"cache": {"existingClaim": "shared", "accessModes": ["ReadWriteMany"]}, "replicas": 3}
    parts = render(shared)
    assert parts["Deployment/slipstream"]["spec"]["strategy"].keys() == {"rollingUpdate"}
    assert not [name for name in parts if name.startswith("PersistentVolumeClaim")]


def test_placed_and_keyed() -> None:
    parts = render(VARIANTS["placed"])
    deployment, container = parts["Deployment/slipstream"], server(parts)
    assert container["image"] == f"registry.example.com/x@{DIGEST}"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert [t["key"] for t in pod(deployment)["tolerations"]] == ["nvidia.com/gpu", "spot"]
    selector = deployment["spec"]["selector"]["matchLabels"]
    spread = pod(deployment)["topologySpreadConstraints"]
    assert [(s["topologyKey"], s["labelSelector"]["matchLabels"]) for s in spread] == [
        ("zone", selector),
        ("host", selector),
    ]
    refs = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container["env"] if "valueFrom" in e}
    assert refs == {
        name: {"name": "keys", "key": key}
        for name, key in (("SLIPSTREAM_API_KEYS", "api"), ("SLIPSTREAM_ADMIN_KEY", "admin"), ("HF_TOKEN", "hub"))
    }
    assert "replicas" not in deployment["spec"], "the autoscaler's"
    (metric,) = parts["HorizontalPodAutoscaler/slipstream"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == Metrics().waiting._name
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "8"}


def test_ingress_has_tls_for_its_hosts() -> None:
    parts = render(VARIANTS["ingress"])
    spec = parts["Ingress/slipstream"]["spec"]
    hosts = ["a.example.com", "b.example.com"]
    assert spec["tls"] == [{"hosts": hosts, "secretName": "slipstream-tls"}]
    assert [rule["host"] for rule in spec["rules"]] == hosts
    backends = {rule["http"]["paths"][0]["backend"]["service"]["name"] for rule in spec["rules"]}
    assert backends == {parts["Service/slipstream"]["metadata"]["name"]}
    assert {"name": "FORWARDED_ALLOW_IPS", "value": "10.0.0.0/8"} in server(parts)["env"]
    open_ingress = {**VARIANTS["ingress"]["ingress"], "tls": {"enabled": False}}
    assert "tls" not in render({"ingress": open_ingress})["Ingress/slipstream"]["spec"]
    assert "has no TLS" in templates({"ingress": open_ingress})["NOTES.txt"]
    assert "https://a.example.com/" in templates(VARIANTS["ingress"])["NOTES.txt"]


def test_two_releases_leave_each_other_alone() -> None:
    ours, theirs = render(PRODUCTION, "red"), render(PRODUCTION, "blue")
    assert not ours.keys() & theirs.keys()
    labels = ours["Deployment/red-slipstream"]["spec"]["template"]["metadata"]["labels"]
    for parts, name, mine in ((ours, "red", True), (theirs, "blue", False)):
        for kind in ("Service", "PodMonitor", "NetworkPolicy", "PodDisruptionBudget", "Deployment"):
            spec = parts[f"{kind}/{name}-slipstream"]["spec"]
            selector = spec.get("podSelector") or spec["selector"]
            assert (selector.get("matchLabels", selector).items() <= labels.items()) is mine, kind
        for trigger in parts[f"ScaledObject/{name}-slipstream"]["spec"]["triggers"]:
            query = trigger["metadata"]["query"]
            assert 'namespace="pictures"' in query
            (pods,) = re.findall(r'pod=~"([^"]*)"', query)
            assert bool(re.fullmatch(pods, "red-slipstream-6d4cf56db6-x7k2p")) is mine
            (metric,) = re.findall(r"slipstream_\w+", query.replace(pods, ""))
            assert metric.removesuffix("_bucket") in {m._name for m in vars(Metrics()).values() if hasattr(m, "_name")}


def test_version_is_the_package_s() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == version
