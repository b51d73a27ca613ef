"""Caches, adapters and the server over text and image tokens: diffusers' own hooks and PEFT as oracles."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

from models import Backbone, Request, advance, generate, load
from models.accelerators import Accelerator, CfgStudent, DiTFastAttn
from models.adapters.lora import WEIGHT_NAME
from models.errors import ModelLoadError, NoProfile, PlanMismatch, WrongBackbone
from models.generate import start
from models.networks.sites import attention, blocks
from models.resolve import resolve
from models.reuse.gates import Gate
from models.reuse.plans import Gated, Recall, StepPlan
from models.search.attention_search import search_plan
from models.search.proposals import caches
from models.training import distill
from models.trajectory import Trajectory
from tests.serving import aio, pixels, serving

Backbones = Callable[..., Backbone]
PROMPT = "a large red circle"
DEPTH = 4


class FirstBlock(Accelerator):
    """All blocks behind the first are reused while what it adds has changed little."""

    mode: Literal["first_block"] = "first_block"
    threshold: float
    claims: ClassVar[frozenset[str]] = frozenset({"cached"})

    def plan(self, step: int, num_steps: int) -> StepPlan:
        return StepPlan({blocks(1, DEPTH): Gated(Gate(self.threshold, pair="mean"))})


class Taylor(Accelerator):
    """Every attention is foretold between computed steps."""

    mode: Literal["taylor"] = "taylor"
    order: int
    interval: int
    warmup: int
    claims: ClassVar[frozenset[str]] = frozenset({"cached"})

    def plan(self, step: int, num_steps: int) -> StepPlan:
        if step < self.warmup or (step - self.warmup - 1) % self.interval == 0:
            return StepPlan()
        return StepPlan({attention(k): Recall(self.order, "taylor") for k in range(DEPTH)})


def run(backbone: Backbone, accelerator: Accelerator, **options: Any) -> Trajectory:
    request = Request(prompt=PROMPT, seed=4, acceleration=accelerator, **options)
    [trajectory] = start(backbone, resolve(backbone.spec, backbone.scheduler_config, request))
    while not trajectory.done:
        advance(backbone, [trajectory])
    return trajectory


def hooked(pipeline: Any, config: Any, **options: Any) -> tuple[torch.Tensor, int]:
    """Final latents of the pipeline under a hook of diffusers, and how often its last block ran."""
    pipeline = copy.deepcopy(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.enable_cache(config)
    ran: list[int] = []
    pipeline.transformer.single_transformer_blocks[1].proj_out.register_forward_hook(lambda *_: ran.append(0))
    generator = torch.Generator().manual_seed(4)
    found = pipeline(PROMPT, generator=generator, max_sequence_length=24, output_type="latent", **options).images
    return found, len(ran)


def packed(latents: torch.Tensor) -> torch.Tensor:
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * c)


OPTIONS: dict[str, Any] = {"width": 32, "height": 24, "num_inference_steps": 9, "guidance_scale": 3.0}


def test_equals_diffusers_first_block_cache(backbone_of: Backbones, pipeline_of: Callable[..., Any]) -> None:
    backbone, mixed = backbone_of("flux-dev"), 0
    for threshold in (0.1, 0.2, 0.3, 0.45, 0.6):
        expected, ran = hooked(pipeline_of("flux-dev"), FirstBlockCacheConfig(threshold=threshold), **OPTIONS)
        ours = run(backbone, FirstBlock(threshold=threshold), **OPTIONS)
        skipped = sum(blocks(1, DEPTH) in step.conditional.reads for step in ours.ran.values() if step.conditional)
        assert 9 - skipped == ran
        assert float((packed(ours.latents) - expected).abs().max()) < 1e-5
        mixed += 0 < skipped < 8
    assert mixed >= 2


@pytest.mark.parametrize(("order", "interval"), [(1, 3), (2, 3), (0, 2)])
def test_equals_diffusers_taylorseer(
    order: int, interval: int, backbone_of: Backbones, pipeline_of: Callable[..., Any]
) -> None:
    config = TaylorSeerCacheConfig(
        cache_interval=interval, disable_cache_before_step=3, max_order=order, taylor_factors_dtype=torch.float32
    )
    expected, _ = hooked(pipeline_of("flux-dev"), config, **OPTIONS)
    ours = run(backbone_of("flux-dev"), Taylor(order=order, interval=interval, warmup=3), **OPTIONS)
    plain = generate(backbone_of("flux-dev"), [Request(prompt=PROMPT, seed=4, **OPTIONS)])[0].latents
    assert float((packed(ours.latents) - expected).abs().max()) < 1e-5
    assert float((ours.latents - plain).abs().max()) > 1e-4


# Adapters on every projection

TARGETS = {
    "flux-dev": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
    "sd3.5": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
    "klein-base": ["to_q", "to_v", "to_out.0", "add_k_proj", "to_add_out", "to_qkv_mlp_proj", "attn.to_out"],
    "z-image": ["to_q", "to_k", "to_v", "to_out.0"],
}


@pytest.mark.parametrize("layout", TARGETS)
def test_students_on_every_attention_projection(
    layout: str, pipeline_of: Callable[..., Any], pipeline_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """As PEFT injects them, alone and beside rows without."""
    network = copy.deepcopy(pipeline_of(layout).transformer)
    names = [
        n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(tuple(TARGETS[layout]))
    ]
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=names, init_lora_weights=False), network)
    weights = {f"transformer.{k}": v.contiguous() for k, v in get_peft_model_state_dict(network).items()}
    alphas = {f"transformer.{name}.alpha": torch.tensor(6.0) for name in names}
    (tmp_path / "taught").mkdir()
    save_file({**weights, **alphas}, tmp_path / "taught" / WEIGHT_NAME, {"guidance_scale": "3.0", "format": "pt"})
    backbone = load(str(pipeline_dir(layout)), device="cpu", dtype="float32", adapters={"taught": tmp_path / "taught"})
    options: dict[str, Any] = {"num_inference_steps": 2, "width": 24, "height": 32}
    taught = Request(prompt=PROMPT, seed=4, acceleration=CfgStudent(), **options)
    scale: dict[str, Any] = {"flux-dev": {}, "z-image": {"guidance_scale": 0.0}}.get(layout, {"guidance_scale": 1.0})
    base = Request(prompt="a ring", seed=5, **options, **scale)
    ours, beside = (one.latents for one in generate(backbone, [taught, base]))
    [alone] = generate(backbone, [base])
    assert torch.allclose(beside, alone.latents, rtol=0, atol=1e-5)
    pipeline = copy.copy(pipeline_of(layout))
    pipeline = type(pipeline)(**{**pipeline.components, "transformer": network})
    pipeline.set_progress_bar_config(disable=True)
    tokens = {"z-image": 64}.get(layout, 24)
    given = {**options, "max_sequence_length": tokens, "generator": torch.Generator().manual_seed(4)}
    theirs = pipeline(prompt=PROMPT, **given, **scale).images[0]
    theirs_again = generate(backbone, [taught])[0].images[0]
    assert np.abs(np.asarray(theirs).astype(int) - np.asarray(theirs_again).astype(int)).max() <= 1
    assert not torch.allclose(
        ours, generate(backbone, [Request(prompt=PROMPT, seed=4, **options, **scale)])[0].latents, atol=1e-3
    )


# Side by side


@aio
async def test_two_kinds_of_model_behind_one_server(backbone_of: Backbones) -> None:
    backbones = {"joint": backbone_of("flux-dev"), "unet": backbone_of("sd")}
    async with serving(backbones) as served:
        bodies: list[dict[str, Any]] = []
        for i in range(3):
            bodies.append({"model": "joint", "seed": i, "prompt": "a ring" * (i + 1)})
            bodies.append({"model": "joint", "seed": i, "acceleration": {"mode": "delta_dit", "blocks": 2}})
            bodies.append({"model": "joint", "seed": i, "true_cfg_scale": 2.0, "negative_prompt": "blue", "width": 24})
            bodies.append({"model": "unet", "seed": i, "acceleration": {"mode": "deepcache"}, "guidance_scale": 3.0})
        together = await asyncio.gather(*(served.post(**body) for body in bodies))
        assert [answer.status_code for answer in together] == [200] * len(bodies)
        for body, answer in zip(bodies, together, strict=True):
            alone = await served.post(**body)
            assert abs(pixels(alone.json()) - pixels(answer.json())).max() <= 2
        refused = await served.post(model="joint", acceleration={"mode": "deepcache"})
        assert refused.status_code == 422
        assert (await served.post(model="unet", true_cfg_scale=2.0)).json()["error"]["param"] == "true_cfg_scale"
        known = {one["id"]: one for one in (await served.client.get("/v1/models")).json()["data"]}
        assert known["joint"]["schedulers"] == ["euler", "dpmpp_2m", "unipc"]
        assert served.value("model_weight_bytes", model="joint", part="text_encoder") > 0
        assert served.value("feature_memory_bytes", model="joint") == 0


@pytest.mark.parametrize("layout", ["flux-dev", "sd3", "klein-base", "z-image"])
def test_what_calibrate_tries_is_possible_on_them(layout: str, backbone_of: Backbones) -> None:
    backbone = backbone_of(layout)
    tried = list(caches(backbone.spec, "euler", 4, None))
    assert {"delta_dit-2-o0", "first_block_cache-o1"} <= {one.name for one in tried}
    for one in tried:
        resolve(
            backbone.spec,
            backbone.scheduler_config,
            Request(prompt=PROMPT, num_inference_steps=4, scheduler="euler", acceleration=one.acceleration),
        )


def test_a_plan_has_only_what_their_attentions_can_do(backbone_of: Backbones) -> None:
    backbone = backbone_of("sd3")
    requests = [Request(prompt=PROMPT, seed=1, num_inference_steps=3, scheduler="euler")]
    plan = search_plan(backbone, requests, threshold=5.0)
    assert {method for row in plan.table for method in row} == {"full", "ast"}
    generate(backbone, [replace(requests[0], acceleration=[DiTFastAttn(plan=plan)])])
    for method in ("wa-rs", "asc", "wa-rs+asc"):
        table = (plan.table[0], (method, *plan.table[1][1:]), plan.table[2])
        other = plan.model_copy(update={"table": table})
        with pytest.raises(PlanMismatch, match=rf"the plan has {re.escape(method)}, which .* cannot do"):
            generate(backbone, [replace(requests[0], acceleration=[DiTFastAttn(plan=other)])])


def test_they_are_not_distilled_and_not_compiled(pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    directory = str(pipeline_dir("sd3"))
    with pytest.raises(WrongBackbone, match="flow matching cannot be distilled"):
        distill(directory, tmp_path, prompts=["x"], steps=1, device="cpu")
    with pytest.raises(ModelLoadError, match="compile: this network has no blocks"):
        load(directory, device="cpu", compile=True)


def test_auto_was_not_measured_beside_true_guidance(backbone_of: Backbones) -> None:
    backbone = backbone_of("flux-dev")
    request = Request(prompt=PROMPT, negative_prompt="x", true_cfg_scale=3.0, scheduler="euler", quality="low")
    with pytest.raises(NoProfile) as caught:
        resolve(backbone.spec, backbone.scheduler_config, request)
    assert caught.value.field == "true_cfg_scale"
