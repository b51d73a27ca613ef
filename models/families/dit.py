"""DiT (Peebles & Xie, 2023): a class in place of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.families.base import Family, Parts
from models.families.configs import ANY
from models.guidance import CONDITIONAL, ClassifierFree
from models.networks.attention import install
from models.networks.base import Network
from models.networks.dit import DiT
from models.request import Run
from models.reuse.plans import Role
from models.reuse.rows import Conditioning


class ClassConditional(Family):
    """A transformer on one of `num_embeds_ada_norm` classes; one more class stands for none."""

    name = "dit"
    pipelines = ("DiTPipeline",)
    network_class = "DiTTransformer2DModel"
    part = "transformer"
    kind = "dit"
    implements = {  # noqa: RUF012
        "num_attention_heads": ANY,
        "attention_head_dim": ANY,
        "in_channels": ANY,  # held against the VAE's latents
        "out_channels": ANY,
        "num_layers": ANY,
        "dropout": ANY,
        "norm_num_groups": ANY,
        "attention_bias": ANY,
        "sample_size": ANY,
        "patch_size": ANY,
        "activation_fn": ANY,
        "num_embeds_ada_norm": ANY,
        "upcast_attention": ANY,  # of no effect in diffusers' fused attention either
        "norm_type": ("ada_norm_zero",),
        "norm_elementwise_affine": (False,),
        "norm_eps": ANY,
    }
    settings = {"id2label": ANY}  # noqa: RUF012
    guidance = ClassifierFree((CONDITIONAL, "unconditional"))
    default_guidance_scale = 4.0
    takes = "class_label"
    inputs = frozenset({"class_label"})
    square = True
    image_to_image = False

    def network(self, module: Any) -> Network:
        """See `Family`."""
        network = DiT(module)
        install(module, network.reusable)
        return network

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`."""
        return {"patch_size": config["patch_size"], "num_classes": config["num_embeds_ada_norm"]}

    def conditioning(self, parts: Parts, run: Run) -> dict[Role, Conditioning]:
        """See `Family`."""
        labels = {CONDITIONAL: run.request.class_label}
        if run.guided:
            labels["unconditional"] = parts.config["num_embeds_ada_norm"]
        return {role: {"class_labels": torch.tensor([label], device=parts.device)} for role, label in labels.items()}

    def to_vae(self, latents: Tensor, config: Any) -> Tensor:
        """See `Family`; its pipeline multiplies where others divide."""
        return 1 / config.scaling_factor * latents  # type: ignore[no-any-return]

    def dummy(self, config: Mapping[str, Any], rows: int, text_tokens: int) -> Conditioning:
        """See `Family`."""
        return {"class_labels": torch.zeros(rows, dtype=torch.long, device="meta")}


DIT = ClassConditional()
