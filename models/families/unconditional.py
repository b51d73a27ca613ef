"""Networks without any conditioning, of which only the cost can be asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.families.base import Family, Parts
from models.families.configs import ANY
from models.guidance import Unguided
from models.networks.base import Network
from models.networks.unet import UNet
from models.request import Run
from models.reuse.plans import Role
from models.reuse.rows import Conditioning


class Unconditional(Family):
    """diffusers' plain `UNet2DModel`, on pixels."""

    name = "unconditioned"
    pipelines = ()
    network_class = "UNet2DModel"
    part = "unet"
    kind = "unet"
    implements = {  # noqa: RUF012
        "sample_size": ANY,
        "in_channels": ANY,
        "out_channels": ANY,
        "center_input_sample": ANY,
        "time_embedding_type": ("positional",),
        "freq_shift": ANY,
        "flip_sin_to_cos": ANY,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "mid_block_type": ("UNetMidBlock2D",),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "block_out_channels": ANY,
        "layers_per_block": ANY,
        "mid_block_scale_factor": ANY,
        "downsample_padding": ANY,
        "downsample_type": ("conv",),
        "upsample_type": ("conv",),
        "dropout": ANY,
        "act_fn": ANY,
        "attention_head_dim": ANY,
        "norm_num_groups": ANY,
        "norm_eps": ANY,
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "add_attention": ANY,
    }
    guidance = Unguided()
    default_guidance_scale = 1.0
    image_to_image = False

    def network(self, module: Any) -> Network:
        """See `Family`."""
        return UNet(module)

    def conditioning(self, parts: Parts, run: Run) -> dict[Role, Conditioning]:
        """See `Family`."""
        return {"conditional": {}}

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`."""
        return {"patch_size": 1, "latent_scale": 1}

    def dummy(self, config: Mapping[str, Any], rows: int, text_tokens: int) -> Conditioning:
        """See `Family`."""
        return {}


UNCONDITIONAL = Unconditional()
