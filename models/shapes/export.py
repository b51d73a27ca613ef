"""A trained model in diffusers' layout, fp16 safetensors, with the defaults a server offers beside it."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    PixArtAlphaPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn

from models.shapes import card, edit_card, editor
from models.shapes.edits import BACKGROUND_WORDS, DIRECTIONS
from models.shapes.networks import noise_scheduler
from models.shapes.shapes import COLOURS, RADII, RELATIONS, SHAPES, SIDE
from models.shapes.text import TextEncoder
from models.shapes.validation import GUIDANCE_SCALES, STEPS

EXAMPLES = (
    "a large red circle above a small blue square on a white background",
    "a small orange star on a black background",
    "a large green ring to the left of a small purple triangle on a yellow background",
    "a small white cross below a large yellow star on a blue background",
    "a large black triangle on a orange background",
    "a small red square to the right of a small green circle on a black background",
    "a large purple cross on a green background",
    "a large blue star above a large orange ring on a white background",
)

EDITS = (
    "make the circle blue",
    "on a black background",
    "move the star to the left",
    "remove the square",
    "make the ring yellow",
    "make the background white",
    "move the triangle down",
    "remove the cross",
)


def save(
    folder: Path, vae: AutoencoderKL, text: TextEncoder, network: nn.Module, figures: dict[str, Any] | None = None
) -> None:
    """Write the pipeline and `slipstream.json`; given figures, these and the card. Networks stay in float32."""
    parts = (vae, text.network, network)
    for part in parts:
        part.to(torch.float16)
    _pipeline(vae, text, network).save_pretrained(folder, safe_serialization=True)
    for part in parts:
        part.to(torch.float32)
    defaults = _edit_defaults() if _edits(network) else _defaults(folder.name)
    (folder / "slipstream.json").write_text(json.dumps(defaults, indent=2) + "\n")
    if figures is not None:
        (folder / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
        sizes = {type(part).__name__: sum(weight.numel() for weight in part.parameters()) for part in parts}
        write = edit_card.text if _edits(network) else card.text
        (folder / "README.md").write_text(write(folder.name, defaults["description"], sizes, figures))


def _pipeline(vae: AutoencoderKL, text: TextEncoder, network: nn.Module) -> DiffusionPipeline:
    common = {"vae": vae, "text_encoder": text.network, "tokenizer": text.tokenizer, "scheduler": noise_scheduler()}
    if isinstance(network, UNet2DConditionModel):
        cls = StableDiffusionInstructPix2PixPipeline if _edits(network) else StableDiffusionPipeline
        return cls(**common, unet=network, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return PixArtAlphaPipeline(**common, transformer=network)


def _edits(network: nn.Module) -> bool:
    config: Any = network.config
    return bool(config.in_channels > config.out_channels)


def _edit_defaults() -> dict[str, Any]:
    return {
        "description": f"Edits pictures of one or two flat shapes, {SIDE}x{SIDE} pixels, as an instruction says",
        "default_guidance_scale": editor.SCALES[0],
        "default_image_guidance_scale": editor.SCALES[1],
        "default_num_inference_steps": editor.STEPS,
        "native_width": SIDE,
        "native_height": SIDE,
        "examples": list(EDITS),
        "prompt_grammar": {
            "templates": [
                "make the {shape} {colour}",
                *(words.format("{colour}") for words in BACKGROUND_WORDS),
                "move the {shape} {direction}",
                "remove the {shape}",
            ],
            "colours": list(COLOURS),
            "shapes": list(SHAPES),
            "directions": list(DIRECTIONS),
        },
    }


def _defaults(name: str) -> dict[str, Any]:
    grammar = {"sizes": list(RADII), "colours": list(COLOURS), "shapes": list(SHAPES), "relations": list(RELATIONS)}
    thing, ending = "a {size} {colour} {shape}", "on a {colour} background"
    return {
        "description": f"One or two flat shapes on a plain background, {SIDE}x{SIDE} pixels",
        "default_guidance_scale": GUIDANCE_SCALES[name],
        "default_num_inference_steps": STEPS,
        "native_width": SIDE,
        "native_height": SIDE,
        "examples": list(EXAMPLES),
        "prompt_grammar": {
            "templates": [f"{thing} {ending}", f"{thing} {{relation}} {thing} {ending}"],
            **grammar,
        },
    }
