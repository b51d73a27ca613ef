"""`python -m models.shapes.train shapes-sd|shapes-dit|shapes-edit`: a bundled model, resumable at any time.

Stages, each continuing from its last checkpoint under `--folder`: vae (shared by both models), text, denoiser,
validate (alignment on held-out captions), export (into models/bundled, or `--output`). Run it again with the same
arguments after an interruption; add `--minutes` to train by the clock instead of by steps. Where the checkpoints are
gone, `--start-from` a folder that export wrote: its steps and minutes count, only the optimizers start anew.
shapes-edit has no vae and text: it starts from shapes-sd, whose autoencoder it keeps.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from models.device import fast_bfloat16
from models.fit import checkpoint
from models.fit.loop import Options, fit
from models.shapes import dataset, export, networks, train_edit, validation
from models.shapes.denoiser import DenoiserTask
from models.shapes.text import TextEncoder, TextTask
from models.shapes.vae import VaeTask, whiten

STAGES = ("vae", "text", "denoiser", "validate", "export")
FAMILIES = {"shapes-sd": "clip", "shapes-dit": "t5", "shapes-edit": "clip"}
SCENES = {"shapes-sd": 40_000, "shapes-dit": 40_000, "shapes-edit": 8_000}
BUNDLED = Path(__file__).parent.parent / "bundled"


def main() -> None:
    """Parse the command line and run the stages asked for."""
    arguments = _parse()
    torch.manual_seed(arguments.seed)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    stages = STAGES if arguments.stage == "all" else (arguments.stage,)
    if arguments.model == "shapes-edit":
        train_edit.run(arguments, stages, _options(arguments, 5000))
        return
    run = {"vae": _vae, "text": _text, "denoiser": _denoiser, "validate": _validate, "export": _export}
    if arguments.start_from is not None:
        _start(arguments)
    for stage in stages:
        run[stage](arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.shapes.train", description=__doc__)
    parser.add_argument("model", choices=FAMILIES)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--steps", type=int, help="length of the stage; each stage has its own default")
    parser.add_argument("--minutes", type=float, help="train by the clock: the whole stage, resumed parts included")
    parser.add_argument("--folder", type=Path, default=Path("runs/shapes"), help="checkpoints and sample grids")
    parser.add_argument("--output", type=Path, default=BUNDLED, help="where export puts the model")
    parser.add_argument("--batch", type=int, default=48, help="captioned scenes a denoiser step")
    parser.add_argument("--false", type=float, default=0.1, help="share of captions that make one false claim")
    parser.add_argument("--start-from", type=Path, help="an exported model to train on, where there is no checkpoint")
    parser.add_argument("--scenes", type=int, help=f"size of the training set; default {SCENES}")
    parser.add_argument("--captions", type=int, default=512, help="how many held-out captions (edits) to validate on")
    parser.add_argument("--scales", type=float, nargs="+", help="default 1 and the model's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.scenes = arguments.scenes or SCENES[arguments.model]
    if arguments.precision == "auto":
        arguments.precision = "bfloat16" if fast_bfloat16(torch.device(arguments.device)) else "float32"
    return arguments


def _options(arguments: argparse.Namespace, steps: int) -> Options:
    return Options(
        folder=arguments.folder,
        steps=arguments.steps or steps,
        minutes=arguments.minutes,
        seed=arguments.seed,
        autocast=arguments.precision == "bfloat16",
    )


def _autocast(arguments: argparse.Namespace) -> torch.autocast:
    return torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=arguments.precision == "bfloat16")


def _start(arguments: argparse.Namespace) -> None:
    """Turn an exported model into the checkpoints that training it would have left behind."""
    path = arguments.folder / f"{arguments.model}.safetensors"
    if path.exists():
        return
    family, start = FAMILIES[arguments.model], arguments.start_from
    AutoencoderKL.from_pretrained(start / "vae", torch_dtype=torch.float32).save_pretrained(arguments.folder / "vae")
    TextEncoder(family, start / "text_encoder").network.float().save_pretrained(arguments.folder / family)
    network = networks.build(arguments.model)
    part = "unet" if (start / "unet").exists() else "transformer"
    network.load_state_dict(type(network).from_pretrained(start / part, torch_dtype=torch.float32).state_dict())
    figures = json.loads((start / "training.json").read_text())
    state = {"step": figures["steps"], "seconds": 60 * figures["minutes"]}
    checkpoint.save(path, network, network.state_dict(), [], state)
    _before_path(arguments).write_text(json.dumps(figures, indent=2) + "\n")


def _vae(arguments: argparse.Namespace) -> None:
    if (arguments.folder / "vae").exists():
        return
    task = VaeTask(torch.device(arguments.device))
    fit(task, replace(_options(arguments, 2000), ema_decay=0.995))
    whiten(task.module)
    task.module.save_pretrained(arguments.folder / "vae")


def _text(arguments: argparse.Namespace) -> None:
    family = FAMILIES[arguments.model]
    if (arguments.folder / family).exists():
        return
    task = TextTask(family, torch.device(arguments.device))
    fit(task, replace(_options(arguments, 1000), ema_decay=0.98, autocast=False))
    task.module.encoder.network.save_pretrained(arguments.folder / family)


def _denoiser(arguments: argparse.Namespace) -> None:
    vae, text, network = _parts(arguments)
    with _autocast(arguments):
        data = dataset.build(vae, text, arguments.folder, arguments.scenes)
    task = DenoiserTask(arguments.model, network, data, vae, text, arguments.batch, arguments.false)
    fit(task, _options(arguments, 20_000))


def _validate(arguments: argparse.Namespace) -> None:
    vae, text, network = _parts(arguments, trained=True)
    rates: dict[str, dict[str, float]] = {}
    for scale in arguments.scales or (1.0, validation.GUIDANCE_SCALES[arguments.model]):
        with _autocast(arguments):
            result = validation.validate(network, vae, text, arguments.captions, scale)
        rates[str(scale)] = result.rates()
        print(f"{arguments.model}, {arguments.captions} captions, guidance scale {scale}: {result}", flush=True)
    state = checkpoint.read_state(arguments.folder / f"{arguments.model}.safetensors")
    figures = {
        "rates": rates,
        "captions": arguments.captions,
        "steps": state["step"],
        "minutes": state["seconds"] / 60,
        "batch": arguments.batch,
        "scenes": arguments.scenes,
        "false": arguments.false,
        "hardware": _hardware(arguments.device),
    }
    if _before_path(arguments).exists():
        before = json.loads(_before_path(arguments).read_text())
        last = {name: before[name] for name in ("steps", "scenes", "false")}
        figures["before"] = [*before.get("before", []), last]
    _figures_path(arguments).write_text(json.dumps(figures, indent=2) + "\n")


def _hardware(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"


def _figures_path(arguments: argparse.Namespace) -> Path:
    path: Path = arguments.folder / f"{arguments.model}-figures.json"
    return path


def _before_path(arguments: argparse.Namespace) -> Path:
    """What the exported model said of itself from which this training goes on."""
    path: Path = arguments.folder / f"{arguments.model}-before.json"
    return path


def _export(arguments: argparse.Namespace) -> None:
    vae, text, network = _parts(arguments, trained=True)
    path = _figures_path(arguments)
    figures = json.loads(path.read_text()) if path.exists() else None
    export.save(arguments.output / arguments.model, vae, text, network, figures)


def _parts(arguments: argparse.Namespace, trained: bool = False) -> tuple[AutoencoderKL, TextEncoder, nn.Module]:
    """The finished autoencoder and text encoder, frozen, and the denoiser, new or as its checkpoint's average."""
    vae = AutoencoderKL.from_pretrained(arguments.folder / "vae").to(arguments.device)
    text = TextEncoder(family := FAMILIES[arguments.model], arguments.folder / family).to(arguments.device)
    network = networks.build(arguments.model)
    if trained:
        checkpoint.load_ema(arguments.folder / f"{arguments.model}.safetensors", network)
        network.eval()
    return vae.eval().requires_grad_(False), text.eval().requires_grad_(False), network.to(arguments.device)


if __name__ == "__main__":
    main()
