"""What the tests of Kubernetes' manifests share: kustomize, the schemas of the API, the parts of a rendering."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

API = "1.34"
CUSTOM = {"monitoring.coreos.com/v1", "keda.sh/v1alpha1", "ray.io/v1"}


def by_name(text: str) -> dict[str, Any]:
    """The documents of a YAML stream by kind and name; empty ones are none."""
    documents = [d for d in yaml.safe_load_all(text) if d]
    out = {f"{d['kind']}/{d['metadata']['name']}": d for d in documents}
    assert len(out) == len(documents), "two of one kind and name"
    return out


def kustomize(folder: Path) -> dict[str, Any]:
    """What kustomize makes of a folder, by kind and name."""
    kubectl = shutil.which("kubectl") or pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return by_name(done.stdout)


def pod(deployment: dict[str, Any]) -> dict[str, Any]:
    """The pod's specification."""
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def validate(manifests: Iterable[dict[str, Any]]) -> None:
    """Raise when manifests of Kubernetes' own kinds do not fit their schemas; unknown fields are not allowed."""
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate from the test extra")
    for manifest in manifests:
        if manifest["apiVersion"] not in CUSTOM:
            validator.validate(manifest, API, strict=True)
