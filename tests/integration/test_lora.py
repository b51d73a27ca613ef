"""Guidance students: rows under a LoRA file beside plain rows, over one set of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import Backbone, Request, Result, generate, load
from models.accelerators import CfgStudent
from models.adapters.files import load_lora
from models.adapters.lora import WEIGHT_NAME
from models.errors import ModelLoadError
from tests.integration.test_mixed import Failing, distance
from tests.pipelines import save_adapter
from tests.reference import by_loop, by_pipeline, generators, text_conditioning

Backbones = Callable[..., Backbone]
Pipelines = Callable[..., Any]
Directories = Callable[[str], Path]

STUDENT: dict[str, Any] = {"prompt": "a red ring", "num_inference_steps": 4, "seed": 3, "scheduler": "ddim"}


def student(backbone: Backbone, **options: Any) -> Request:
    return Request(**{**STUDENT, "acceleration": CfgStudent(), **options})


def base(**options: Any) -> Request:
    return Request(**{**STUDENT, "guidance_scale": 1.0, **options})


def with_adapter(pipeline: Any, adapter: Path, alpha: float = 2) -> Any:
    """A pipeline of its own whose network has this adapter alone: by diffusers for U-Nets, by PEFT for the others."""
    copied = copy.copy(pipeline)
    if hasattr(pipeline, "unet"):
        copied.register_modules(unet=copy.deepcopy(pipeline.unet))
        copied.load_lora_weights(adapter)
        return copied
    network = copy.deepcopy(pipeline.transformer)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=alpha, target_modules=targets), network)
    weights = {k.removeprefix("transformer."): v for k, v in load_file(adapter / WEIGHT_NAME).items()}
    assert not set_peft_model_state_dict(network, weights).unexpected_keys
    copied.register_modules(transformer=network)
    return copied


def drawn(pipeline: Any) -> Tensor:
    """The request of `student`, unguided."""
    if hasattr(pipeline, "unet"):
        options = {k: STUDENT[k] for k in ("prompt", "num_inference_steps")}
        return by_pipeline(pipeline, "ddim", guidance_scale=1.0, generator=generators(3, 1), **options).latents
    rows = text_conditioning(pipeline, "a red ring", "", guided=False)
    return by_loop(pipeline, "ddim", rows, steps=4, scale=1.0, seeds=generators(3, 1)).latents


def network_of(pipeline: Any) -> Any:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


@pytest.mark.parametrize("alpha", [None, 7.0])
@pytest.mark.parametrize("layout", ["sd", "sdxl", "pixart-alpha"])
def test_student_rows_equal_the_model_with_the_adapter_alone(
    layout: str, alpha: float | None, pipeline_of: Pipelines, pipeline_dir: Directories, tmp_path: Path
) -> None:
    pipeline = pipeline_of(layout)
    adapter = save_adapter(network_of(pipeline), tmp_path / "a", alpha=alpha, guidance_scale=4)
    backbone = load(str(pipeline_dir(layout)), device="cpu", dtype="float32", adapters={"a": adapter})
    [result] = generate(backbone, [student(backbone)])
    expected = drawn(with_adapter(pipeline, adapter, alpha or 2))
    assert distance(result.latents, expected) <= 1e-5
    assert distance(expected, drawn(pipeline)) > 1e-2


@pytest.mark.parametrize("layout", ["sd", "dit", "pixart-sigma"])
def test_base_rows_beside_students_are_bitwise_those_of_the_plain_model(
    layout: str, student_of: Backbones, backbone_of: Backbones
) -> None:
    """At the same batch shape: once beside a student, once beside another plain request."""
    label = {"class_label": 4, "prompt": None} if layout == "dit" else {}
    plain, other = base(**label), base(seed=9, **label)
    backbone = student_of(layout)
    mixed = generate(backbone, [plain, student(backbone, seed=9, **label)])
    alike = generate(backbone_of(layout), [plain, other])
    assert torch.equal(mixed[0].latents, alike[0].latents)
    assert not torch.equal(mixed[1].latents, alike[1].latents)


def test_two_adapters_in_one_batch(pipeline_of: Pipelines, pipeline_dir: Directories, tmp_path: Path) -> None:
    pipeline = pipeline_of("sd")
    first = save_adapter(pipeline.unet, tmp_path / "first", guidance_scale=4)
    second = save_adapter(pipeline.unet, tmp_path / "second", alpha=9, guidance_scale=5)
    backbone = load(str(pipeline_dir("sd")), device="cpu", dtype="float32", adapters={"first": first, "second": second})
    requests = [student(backbone, acceleration=CfgStudent(adapter=n)) for n in ("second", "first")]
    results = generate(backbone, [requests[0], base(), requests[1]])
    expected = [with_adapter(pipeline, second), pipeline, with_adapter(pipeline, first)]
    for result, reference in zip(results, expected, strict=True):
        assert distance(result.latents, drawn(reference)) <= 1e-5


@pytest.mark.parametrize("layout", ["sd", "pixart-alpha"])
def test_adapters_on_some_projections_beside_one_on_all(
    layout: str, pipeline_of: Pipelines, pipeline_dir: Directories, tmp_path: Path
) -> None:
    """Alone, and in one batch with base rows."""
    pipeline = pipeline_of(layout)
    full = save_adapter(network_of(pipeline), tmp_path / "full", guidance_scale=4)
    adapters = {"full": full}
    for targets in (("to_q",), ("to_v",), ("attn2.to_k", "to_out.0")):
        name = targets[-1]
        weights = {k: v for k, v in load_file(full / WEIGHT_NAME).items() if any(f".{t}." in k for t in targets)}
        adapters[name] = tmp_path / name
        adapters[name].mkdir()
        save_file(weights, adapters[name] / WEIGHT_NAME, {"format": "pt", "guidance_scale": "4"})
    backbone = load(str(pipeline_dir(layout)), device="cpu", dtype="float32", adapters=adapters)
    requests = [student(backbone, acceleration=CfgStudent(adapter=name)) for name in adapters]
    *together, plain = generate(backbone, [*requests, base()])
    expected = [drawn(with_adapter(pipeline, adapter)) for adapter in adapters.values()]
    for request, result, reference in zip(requests, together, expected, strict=True):
        assert distance(result.latents, reference) <= 1e-5
        assert distance(generate(backbone, [request])[0].latents, reference) <= 1e-5
        assert distance(reference, drawn(pipeline)) > 1e-3
    assert distance(plain.latents, drawn(pipeline)) <= 1e-5


def test_an_exception_leaves_nothing_behind(student_of: Backbones) -> None:
    backbone = student_of("sd")
    weights = {k: v.clone() for k, v in backbone.network.module.state_dict().items()}
    before = generate(backbone, [base()])[0], generate(backbone, [student(backbone)])[0]
    with pytest.raises(RuntimeError, match="broken on purpose"):
        generate(replace(backbone, network=Failing(backbone.network, at=1)), [base(), student(backbone)])
    after = generate(backbone, [base()])[0], generate(backbone, [student(backbone)])[0]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(v, weights[k]) for k, v in backbone.network.module.state_dict().items())


def test_a_student_takes_one_row_and_says_its_scale(student_of: Backbones) -> None:
    backbone = student_of("sd")
    result: Result = generate(backbone, [student(backbone, guidance_scale=3.0)])[0]
    assert result.usage.rows == result.usage.steps == 4
    assert backbone.spec.adapters["student"].guidance_scale == 3.0
    assert 0 < backbone.adapter_bytes() == 4 * backbone.spec.adapters["student"].parameters


def _retargeted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("attn1.to_q", "ff.net.2"): v for k, v in weights.items()}


def _halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for i, (k, v) in enumerate(weights.items()) if i}


def _foreign_shape(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.cat([v, v], dim=1) if "down" in k else v for k, v in weights.items()}


@pytest.mark.parametrize(
    ("change", "metadata", "complaint"),
    [
        (dict, {"guidance_scale": "much"}, "guidance_scale"),
        (dict, {"guidance_scale": "4", "config_hash": "of another model"}, "another base model"),
        (_retargeted, {"guidance_scale": "4"}, "is for a layer of shape|in its one half"),
        (_foreign_shape, {"guidance_scale": "4"}, "is for a layer of shape|in its one half"),
        (_halved, {"guidance_scale": "4"}, "no half of a LoRA pair"),
        (lambda _: {"x": torch.ones(1)}, {"guidance_scale": "4"}, "LoRA"),
        (dict, {"guidance_scale": "4", "lora_adapter_metadata": '{"unet.use_dora": true}'}, "use_dora"),
    ],
)
def test_refused_files(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    metadata: dict[str, str],
    complaint: str,
    pipeline_of: Pipelines,
    tmp_path: Path,
) -> None:
    unet = pipeline_of("sd").unet
    adapter = save_adapter(unet, tmp_path / "a")
    save_file(change(load_file(adapter / WEIGHT_NAME)), adapter / WEIGHT_NAME, metadata)
    with pytest.raises(ModelLoadError, match=complaint):
        load_lora(adapter, unet, "the hash of this model")


def test_pickles_and_absent_files_are_refused(pipeline_dir: Directories, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "pickle.safetensors")
    for file in ("pickle.safetensors", "absent.safetensors"):
        with pytest.raises(ModelLoadError, match="not a safetensors file"):
            load(str(pipeline_dir("sd")), device="cpu", dtype="float32", adapters={"a": tmp_path / file})
