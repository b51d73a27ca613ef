"""Models and runs as plain data, for tests that need no tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from models.networks.sites import TransformerSites, UNetSites
from models.profiles import Candidate, Likeness, Profile, pareto
from models.spec import AdapterInfo, ModelSpec, RunSpec

UNET_SITES = UNetSites(4, channels=(8,) * 12, halvings=(0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3))
DIT_SITES = TransformerSites(
    4,
    depth=4,
    patch_size=2,
    dim=16,
    heads=2,
    head_dim=8,
    offers=frozenset({"modulated", "cross_attention", "feed_forward"}),
)
SCHEDULERS = ("ddim", "pndm", "euler", "dpmpp_2m", "heun")


def unet_spec(depth: int = 12, **changes: Any) -> ModelSpec:
    """A U-Net as Stable Diffusion 1.5 has it, with a student of scale 4."""
    spec = ModelSpec(
        name="unet",
        family="unet",
        layout="sd",
        config_hash="hash",
        sites=replace(UNET_SITES, channels=(8,) * depth, halvings=(0,) * depth, skips=(8,) * depth),
        depth=depth,
        latent_channels=4,
        latent_scale=8,
        patch_size=1,
        native_width=512,
        native_height=512,
        schedulers=SCHEDULERS,
        inputs=frozenset({"negative_prompt", "prompt_embeds", "negative_prompt_embeds"}),
        adapters={"student": AdapterInfo("student", 4.0, rank=4, parameters=100)},
    )
    return replace(spec, **changes)


def dit_spec(depth: int = 28, **changes: Any) -> ModelSpec:
    """A transformer of 64 tokens at 128 pixels."""
    sites = replace(DIT_SITES, depth=depth)
    shape = {"sites": sites, "family": "dit", "layout": "pixart", "name": "dit", "patch_size": 2}
    return replace(unet_spec(depth), **{**shape, "native_width": 128, "native_height": 128, **changes})


def class_spec(depth: int = 28, **changes: Any) -> ModelSpec:
    """The transformer above on one of ten classes in place of a prompt: square pictures, and none to start from."""
    facts: dict[str, Any] = {"layout": "dit", "takes": "class_label", "inputs": frozenset({"class_label"})}
    facts |= {"num_classes": 10, "has_text_encoder": False, "square": True, "image_to_image": False}
    return dit_spec(depth, **{**facts, **changes})


def run_spec(steps: int = 10, **changes: Any) -> RunSpec:
    """A guided run of the dit above."""
    run = RunSpec(
        scheduler="ddim",
        num_inference_steps=steps,
        num_steps=steps,
        tokens=64,
        guided=True,
        guidance_scale=None,
        negative=False,
    )
    return replace(run, **changes)


LIKENESSES: tuple[Likeness, ...] = ("plain", "converged")


def candidate(name: str, macs: int, psnr: float, converged: float, **facts: Any) -> Candidate:
    """What was measured of a run; its time is as its MACs."""
    measured: dict[str, Any] = {"psnr": {"mean": psnr}, "ssim": {"mean": 0.9}, "psnr_converged": {"mean": converged}}
    run: dict[str, Any] = {"scheduler": "ddim", "num_inference_steps": 10, "evaluations": macs / 100}
    return Candidate.model_validate({"name": name, "macs": macs, "seconds": macs / 1000, **run, **measured, **facts})


def profile(*candidates: Candidate, **facts: Any) -> Profile:
    """A profile of the U-Net above at ten steps: with none given, one with a dominated run in it."""
    plain = candidate("plain", 1000, 100.0, 40.0)
    chosen = candidates or (
        candidate("unipc-8", 800, 41.0, 46.0, scheduler="dpmpp_2m", num_inference_steps=8),
        candidate("deepcache", 700, 43.0, 35.0, acceleration=[{"mode": "deepcache", "interval": 2}]),
        candidate("forecast-5", 500, 38.0, 38.5, acceleration=[{"mode": "forecast", "evaluations": 5}]),
        candidate("student", 400, 31.0, 36.0, acceleration=[{"mode": "cfg_student", "adapter": "student"}]),
        candidate("unipc-3", 300, 30.0, 35.5, scheduler="dpmpp_2m", num_inference_steps=3),
    )
    fronts = {to: [one.name for one in pareto([plain, *chosen], to)] for to in LIKENESSES}
    known: dict[str, Any] = {"model": "unet", "config_hash": "hash", "scheduler": "ddim", "num_inference_steps": 10}
    known |= {"width": 64, "height": 32, "guidance_scale": 4.0, "reference_steps": 200, "captions": ["a"], "fitted": 0}
    if "reference_scheduler" in Profile.model_fields:
        known["reference_scheduler"] = "ddim"
    return Profile.model_validate({**known, "plain": plain, "candidates": chosen, "fronts": fronts, **facts})
