"""The stages of shapes-edit: shapes-sd, widened to take a picture and to know the words of instructions, trained on."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from models.fit import checkpoint
from models.fit.loop import Options, fit
from models.shapes import editor, export, networks
from models.shapes.edits import EDIT_WORDS
from models.shapes.text import TextEncoder, with_words

NAME = "shapes-edit"
START = Path(__file__).parent.parent / "bundled" / "shapes-sd"


def run(arguments: argparse.Namespace, stages: tuple[str, ...], options: Options) -> None:
    """Those of `stages` that the model has: denoiser (with the text encoder), validate, export."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    start = arguments.start_from or START
    vae = AutoencoderKL.from_pretrained(start / "vae", torch_dtype=torch.float32).to(arguments.device)
    vae = vae.eval().requires_grad_(False)
    text = with_words(start / "text_encoder", EDIT_WORDS).to(arguments.device)
    unet = networks.widened(start / "unet").to(arguments.device)
    if start.name == NAME and not _checkpoint(arguments).exists():
        _go_on(arguments, start, nn.ModuleDict({"unet": unet, "text": text.network}))
    autocast = torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=options.autocast)
    if "denoiser" in stages:
        with autocast:
            data = editor.build_data(vae, arguments.folder, arguments.scenes)
        task = editor.EditTask(NAME, unet, text, data, vae, arguments.batch)
        fit(task, replace(options, ema_decay=0.995))
    if "validate" in stages or "export" in stages:
        checkpoint.load_ema(_checkpoint(arguments), nn.ModuleDict({"unet": unet, "text": text.network}))
        unet.eval()
        text.eval()
    if "validate" in stages:
        with autocast:
            measured = _measure(arguments, unet, vae, text)
        _figures(arguments).write_text(json.dumps(measured, indent=2) + "\n")
    if "export" in stages:
        path = _figures(arguments)
        figures = json.loads(path.read_text()) if path.exists() else None
        export.save(arguments.output / NAME, vae, text, unet, figures)


def _measure(
    arguments: argparse.Namespace, unet: nn.Module, vae: AutoencoderKL, text: TextEncoder
) -> dict[str, object]:
    """Edits that succeed, at each `--scales` of the text (default 1, which is no guidance, and the model's)."""
    rates: dict[str, dict[str, float]] = {}
    for scale in arguments.scales or (1.0, editor.SCALES[0]):
        result = editor.validate(unet, vae, text, arguments.captions, (scale, editor.SCALES[1]))
        rates[str(scale)] = result.rates()
        print(f"{NAME}, {arguments.captions} edits, guidance scale {scale}: {result}", flush=True)
    state = checkpoint.read_state(_checkpoint(arguments))
    return {
        "rates": rates,
        "edits": arguments.captions,
        "image_scale": editor.SCALES[1],
        "steps": state["step"],
        "minutes": state["seconds"] / 60,
        "batch": arguments.batch,
        "scenes": arguments.scenes,
        "hardware": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else f"{torch.get_num_threads()} CPU thread(s)",
    }


def _go_on(arguments: argparse.Namespace, start: Path, module: nn.Module) -> None:
    """Turn the exported model into the checkpoint that training it would have left behind."""
    figures = json.loads((start / "training.json").read_text())
    state = {"step": figures["steps"], "seconds": 60 * figures["minutes"]}
    checkpoint.save(_checkpoint(arguments), module, module.state_dict(), [], state)


def _checkpoint(arguments: argparse.Namespace) -> Path:
    path: Path = arguments.folder / f"{NAME}.safetensors"
    return path


def _figures(arguments: argparse.Namespace) -> Path:
    path: Path = arguments.folder / f"{NAME}-figures.json"
    return path
