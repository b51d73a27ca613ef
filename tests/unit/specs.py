"""Models and runs as plain data, for tests that need no tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from models.networks.sites import TransformerSites, UNetSites
from models.spec import AdapterInfo, ModelSpec, RunSpec

UNET_SITES = UNetSites(4, channels=(8,) * 12, halvings=(0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3))
DIT_SITES = TransformerSites(4, depth=4, patch_size=2, dim=16, heads=2, head_dim=8)
SCHEDULERS = ("ddim", "pndm", "euler", "dpmpp_2m", "heun")


def unet_spec(depth: int = 12, **changes: Any) -> ModelSpec:
    """A U-Net as Stable Diffusion 1.5 has it, with a student of scale 4."""
    spec = ModelSpec(
        name="unet",
        family="unet",
        layout="sd",
        config_hash="hash",
        sites=replace(UNET_SITES, channels=(8,) * depth, halvings=(0,) * depth),
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
