"""Caches, adapters and the server over text and image tokens: diffusers' own hooks and PEFT as oracles."""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor

from models import Backbone, Request, generate, load
from models.accelerators import (
    Accelerator,
    CfgStudent,
    DiTFastAttn,
    FirstBlockCache,
    MagCache,
    TaylorSeer,
    TeaCache,
)
from models.adapters.lora import WEIGHT_NAME
from models.denoise import Tick
from models.errors import ModelLoadError, NoProfile, PlanMismatch, WrongBackbone
from models.generate import start
from models.resolve import resolve
from models.search.attention_search import search_plan
from models.search.fitting import can_fit, fit
from models.search.proposals import caches
from models.training import distill
from models.trajectory import Trajectory, effective_steps
from tests.integration.test_mixed import distance
from tests.serving import aio, pixels, serving

Backbones = Callable[..., Backbone]
PROMPT = "a large red circle"


def run(backbone: Backbone, accelerator: Accelerator, **options: Any) -> tuple[list[Tensor], Trajectory]:
    """Each step's prediction of the conditional row, as its pipeline packs it, and the run."""
    request = Request(**{"prompt": PROMPT, "seed": 4, "acceleration": accelerator, **options})
    [trajectory] = start(backbone, resolve(backbone.spec, backbone.scheduler_config, request))
    seen = []
    while not trajectory.done:
        rows = [(row, trajectory) for row in trajectory.rows()]
        tick = Tick(backbone, [trajectory], rows)
        out = tick.forward()
        seen.append(packed(out[[row.role for row, _ in tick.rows].index("conditional")][None].clone()))
        tick.step(out)
    return seen, trajectory


def hooked(pipeline: Any, config: Any, counted: str, **options: Any) -> tuple[list[Tensor], Tensor, int]:
    """Each step's prediction for the prompt of the pipeline under a hook of diffusers, its final latents, and how often
    a module ran."""
    pipeline = copy.deepcopy(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.enable_cache(config)
    ran: list[int] = []
    seen: list[Tensor] = []
    pipeline.transformer.get_submodule(counted).register_forward_hook(lambda *_: ran.append(0))
    pipeline.transformer.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))
    generator = torch.Generator().manual_seed(4)
    found = pipeline(PROMPT, generator=generator, max_sequence_length=24, output_type="latent", **options).images
    rows = 2 if "true_cfg_scale" in options else 1  # the prompt's forward, then the negative one's
    return seen[::rows], found, len(ran) // rows


def packed(latents: torch.Tensor) -> torch.Tensor:
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * c)


def check(
    ours: tuple[list[Tensor], Trajectory], theirs: tuple[list[Tensor], Tensor, int], tolerance: float = 1e-7
) -> int:
    """Hold both against each other, step by step; how many steps were skipped."""
    (found, trajectory), (expected, latents, ran) = ours, theirs
    assert len(found) == len(expected) == STEPS
    for step in range(STEPS):
        assert distance(found[step], expected[step]) <= tolerance, step
    assert distance(packed(trajectory.latents), latents) <= tolerance
    skipped = sum(row.reduced for step in effective_steps(trajectory) for row in step if row is step.conditional)
    assert STEPS - skipped == ran
    return skipped


STEPS = 9
OPTIONS: dict[str, Any] = {"width": 32, "height": 24, "num_inference_steps": STEPS, "guidance_scale": 3.0}
GUIDED: dict[str, Any] = {**OPTIONS, "true_cfg_scale": 2.0, "negative_prompt": "blue"}
LAST = "single_transformer_blocks.1.proj_out"


@pytest.mark.parametrize("threshold", [0.3, 0.45, 0.6])
def test_equals_diffusers_first_block_cache(
    threshold: float, backbone_of: Backbones, pipeline_of: Callable[..., Any]
) -> None:
    theirs = hooked(pipeline_of("flux-dev", torch.float64), FirstBlockCacheConfig(threshold=threshold), LAST, **OPTIONS)
    ours = run(backbone_of("flux-dev", torch.float64), FirstBlockCache(threshold=threshold), **OPTIONS)
    assert 0 < check(ours, theirs) < STEPS - 1


@pytest.mark.parametrize("options", [OPTIONS, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("settings", [{}, {"threshold": 0.4, "max_skips": 2, "retention": 0.3}], ids=["usual", "more"])
def test_equals_diffusers_magcache(
    settings: dict[str, Any], options: dict[str, Any], backbone_of: Backbones, pipeline_of: Callable[..., Any]
) -> None:
    """Under the ratios that are published for Flux."""
    names = {"max_skips": "max_skip_steps", "retention": "retention_ratio"}
    config = MagCacheConfig(
        mag_ratios=FLUX_MAG_RATIOS,
        num_inference_steps=STEPS,
        **{names.get(name, name): value for name, value in settings.items()},
    )
    theirs = hooked(pipeline_of("flux-dev", torch.float64), config, LAST, **options)
    cache = MagCache(ratios=tuple(FLUX_MAG_RATIOS.tolist()), **settings)
    assert 0 < check(run(backbone_of("flux-dev", torch.float64), cache, **options), theirs) < STEPS - 1


@pytest.mark.parametrize("options", [OPTIONS, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize(("interval", "order", "warmup"), [(3, 2, 2), (2, 1, 1), (2, 0, 3)])
def test_equals_diffusers_taylorseer(
    interval: int,
    order: int,
    warmup: int,
    options: dict[str, Any],
    backbone_of: Backbones,
    pipeline_of: Callable[..., Any],
) -> None:
    """Told every attention and feed-forward; by default diffusers leaves the feed-forwards out."""
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=warmup,
        max_order=order,
        taylor_factors_dtype=torch.float64,
        cache_identifiers=[
            r"transformer_blocks\.\d+\.(attn|ff|ff_context)",
            r"single_transformer_blocks\.\d+\.proj_out",
        ],
    )
    theirs = hooked(pipeline_of("flux-dev", torch.float64), config, "transformer_blocks.1.ff.net.0", **options)
    cache = TaylorSeer(order=order, interval=interval, warmup=warmup)
    assert check(run(backbone_of("flux-dev", torch.float64), cache, **options), theirs) > 1


def test_calibrate_finds_the_ratios_that_diffusers_finds(
    backbone_of: Backbones, pipeline_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the image's tokens, along a plain run."""
    config = MagCacheConfig(calibrate=True, num_inference_steps=STEPS)
    hooked(pipeline_of("flux-dev", torch.float64), config, LAST, **OPTIONS)
    [printed] = re.findall(r"\[1\.0, .*\]", capsys.readouterr().out)
    backbone = backbone_of("flux-dev", torch.float64)
    assert can_fit(backbone, STEPS)
    found = fit(backbone, [Request(prompt=PROMPT, seed=4, **OPTIONS)])
    assert found.mag_ratios[:-2] == pytest.approx(json.loads(printed)[:-2], abs=2e-6)
    assert len(found.mag_ratios) == STEPS


class TeaByHand:
    """TeaCache as its authors have it for Flux: a pre-hook on the first block, a hook on the last. Nothing is saved,
    but what is computed and not wanted is thrown away."""

    def __init__(self, transformer: Any, threshold: float) -> None:
        self._first, self._threshold = transformer.transformer_blocks[0], threshold
        self._seen: Tensor | None = None
        self._input = self._effect = torch.empty(0)
        self._sum, self._skip = 0.0, False
        self.skipped: list[int] = []
        self.step = 0
        self._first.register_forward_pre_hook(self._before, with_kwargs=True)
        transformer.single_transformer_blocks[-1].register_forward_hook(self._after)

    def _before(self, block: Any, args: Any, given: dict[str, Tensor]) -> None:
        self._input = given["hidden_states"]
        now = block.norm1(self._input, emb=given["temb"])[0]
        if self._seen is not None and self.step < STEPS - 1:
            change = float((now - self._seen).abs().mean() / self._seen.abs().mean())
            self._sum += float(np.poly1d(TEA)(change))
        self._skip = self._seen is not None and self.step < STEPS - 1 and self._sum < self._threshold
        self._seen = now

    def _after(self, block: Any, args: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.skipped += [self.step] if self._skip else []
        self.step += 1
        if self._skip:
            return out[0], self._input + self._effect
        self._sum, self._effect = 0.0, out[1] - self._input
        return out


TEA = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
"""Published for Flux."""


@pytest.mark.parametrize("threshold", [0.25, 0.6])
def test_equals_teacache_followed_by_hand(
    threshold: float, backbone_of: Backbones, pipeline_of: Callable[..., Any]
) -> None:
    pipeline = copy.deepcopy(pipeline_of("flux-dev", torch.float64))
    hand = TeaByHand(pipeline.transformer, threshold)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(4)
    expected = pipeline(PROMPT, generator=generator, max_sequence_length=24, output_type="latent", **OPTIONS).images
    _, trajectory = run(
        backbone_of("flux-dev", torch.float64), TeaCache(threshold=threshold, coefficients=TEA), **OPTIONS
    )
    skipped = [i for i, step in enumerate(effective_steps(trajectory)) if step.reduced]
    assert skipped == hand.skipped
    assert 0 < len(skipped) < STEPS - 2
    assert distance(packed(trajectory.latents), expected) <= 1e-7


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
    assert {method for row in plan.table for method in row} <= {"full", "ast", "wa-rs"}
    generate(backbone, [replace(requests[0], acceleration=[DiTFastAttn(plan=plan)])])
    for method in ("asc", "wa-rs+asc"):
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
