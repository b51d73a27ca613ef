"""Loading a bundled name, a directory or a hub id in diffusers' layout: safetensors only, no code from a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from huggingface_hub import snapshot_download

from models.adapters.lora import load_lora
from models.backbone import Backbone, Network, Stepping
from models.device import find_device
from models.errors import ModelLoadError
from models.families.conditioning import Conditioner
from models.networks.attention import install
from models.networks.transformer import DiT
from models.networks.unet import UNet, truncate
from models.search.attention_plan import Plan
from models.solvers.names import default_name, supported
from models.spec import Layout, ModelSpec

BUNDLED = Path(__file__).parent / "bundled"

LAYOUTS: dict[str, Layout] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "DiTPipeline": "dit",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
}
"""Pipeline classes that can be served. A family is added by a file beside this and a line here."""

_TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
"""Parts that a directory may leave out: requests then bring their embeddings along."""


def load(
    name: str,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    depth: int | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    plans: Mapping[str, str | Path | Plan] | None = None,
    compile: bool = False,
    stepping: Stepping | Literal["auto"] = "auto",
) -> Backbone:
    """Load a model: a bundled name, a directory, or a hub id.

    `depth` loads only the first input blocks of a U-Net and their output blocks (depth-skip as a load option): what
    lies deeper never reaches memory, and students beside the model, distilled from all of it, stay where they are.
    `adapters` and `plans` add to those found beside the model, by name.
    `stepping`: `exact` lets diffusers' schedulers take their own steps, bit for bit its pipelines; `batched` steps all
    trajectories of a tick together, latents in float32; `auto` is exact on a CPU in float32 and above, else batched.
    `compile` compiles the repeated blocks (torch.compile, any batch size); what differs by row stays out of the graphs.
    Raises `ModelLoadError` where the files are not a servable model.
    """
    directory = _locate(name)
    device = find_device(device)
    dtype = _dtype(dtype, device)
    index = _json(directory / "model_index.json")
    layout = LAYOUTS.get(str(index.get("_class_name")))
    if layout is None:
        raise ModelLoadError(f"{name}: {index.get('_class_name')} is not one of {', '.join(LAYOUTS)}")
    part = "unet" if layout in ("sd", "sdxl") else "transformer"
    config = _json(directory / part / "config.json")
    overrides: dict[str, Any] = {n: None for n in _TEXT_PARTS if n in index and not (directory / n).is_dir()}
    if layout == "sd":
        overrides |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if depth is not None:
        overrides["unet"] = _truncated_unet(directory / "unet", config, depth, layout, dtype)
    pipeline = _read(directory, str(index["_class_name"]), dtype, overrides).to(device)
    module = getattr(pipeline, part).eval()
    module.requires_grad_(False)
    network = cast(Network, UNet(module) if part == "unet" else DiT(module))
    install(module, network.reusable)
    if compile:
        _compile_blocks(module)
    if getattr(pipeline.vae.config, "force_upcast", False) and dtype == torch.float16:
        pipeline.vae.to(torch.float32)
    extras = _extras(directory)
    digest = config_hash(config)
    students = {**(_found(directory, "adapters") if depth is None else {}), **(adapters or {})}
    loras = {n: load_lora(p, module, digest, n) for n, p in students.items()}
    files = {**_found(directory, "plans", ".json"), **(plans or {})}
    how: Stepping = stepping if stepping != "auto" else auto_stepping(device, dtype)
    spec = _spec(Path(name).name, layout, config, digest, network, pipeline, extras, dtype, how).with_extras(
        {n: lora.info for n, lora in loras.items()},
        {n: p if isinstance(p, Plan) else Plan.load(p) for n, p in files.items()},
    )
    conditioner = Conditioner(pipeline, layout, dtype, device, extras.get("max_sequence_length"))
    return Backbone(spec, network, conditioner, pipeline.vae, pipeline.scheduler.config, loras, device, dtype, how)


def auto_stepping(device: torch.device, dtype: torch.dtype) -> Stepping:
    """Exact where bitwise parity is promised, batched where launches and half precision make it the better one."""
    return "exact" if device.type == "cpu" and dtype in (torch.float32, torch.float64) else "batched"


def _compile_blocks(network: torch.nn.Module) -> None:
    """Regional compilation: the blocks that repeat are compiled once a kind, in seconds instead of minutes."""
    for block in network.modules():
        if isinstance(block, ResnetBlock2D | BasicTransformerBlock):
            block.compile(dynamic=True)


def config_hash(config: Mapping[str, Any]) -> str:
    """A short digest of a network's architecture; plans and adapters carry it to refuse a foreign base."""
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _locate(name: str) -> Path:
    if (BUNDLED / name / "model_index.json").is_file():
        return BUNDLED / name
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise ModelLoadError(f"{name}: no model_index.json, this is not a directory in diffusers' layout")
        return Path(name)
    try:
        patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise ModelLoadError(f"{name}: no bundled model, no directory, and the hub says: {error}") from error


def _read(directory: Path, class_name: str, dtype: torch.dtype, overrides: Mapping[str, Any]) -> Any:
    cls: type[DiffusionPipeline] = getattr(diffusers, class_name)
    try:
        pipeline = cls.from_pretrained(directory, dtype=dtype, use_safetensors=True, local_files_only=True, **overrides)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"{directory}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _truncated_unet(directory: Path, config: dict[str, Any], depth: int, layout: Layout, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel
    from safetensors import safe_open

    if layout not in ("sd", "sdxl"):
        raise ModelLoadError("depth: only a U-Net can be loaded in part")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    levels = UNet(unet).depth
    if not 1 <= depth <= levels:
        raise ModelLoadError(f"depth: {depth} is not in 1..{levels}")
    names = truncate(unet, depth)
    wanted = set(names.values())
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            weights |= {key: opened.get_tensor(key).to(dtype) for key in opened.keys() if key in wanted}  # noqa: SIM118
    missing = wanted - weights.keys()
    if missing:
        raise ModelLoadError(f"{directory}: {len(missing)} weights are missing, {min(missing)} first")
    unet.load_state_dict({name: weights[stored] for name, stored in names.items()}, assign=True)
    return unet


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return dtype if isinstance(dtype, torch.dtype) else cast(torch.dtype, getattr(torch, dtype))


def _extras(directory: Path) -> dict[str, Any]:
    """What a model says of itself beyond diffusers' layout: defaults, examples, a description."""
    file = directory / "slipstream.json"
    return _json(file) if file.is_file() else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file}: cannot be read: {error}") from error
    return found


def _found(directory: Path, kind: str, suffix: str = "") -> dict[str, str | Path]:
    """Adapters (directories) or plans (JSON files) that lie beside a model."""
    return {p.name.removesuffix(suffix): p for p in sorted((directory / kind).glob(f"*{suffix}"))}


DEFAULT_SCALES: dict[Layout, float] = {"sd": 7.5, "sdxl": 5.0, "dit": 4.0, "pixart": 4.5}
"""The guidance scales that diffusers' pipelines default to."""


def _spec(
    name: str,
    layout: Layout,
    config: dict[str, Any],
    digest: str,
    network: Network,
    pipeline: Any,
    extras: dict[str, Any],
    dtype: torch.dtype,
    stepping: Stepping,
) -> ModelSpec:
    unet = layout in ("sd", "sdxl")
    scale = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    side = config["sample_size"]
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    scheduler = default_name(pipeline.scheduler.config)
    given = {k: extras[k] for k in ("description", "prompt_grammar") if k in extras}
    return ModelSpec(
        name=name,
        family="unet" if unet else "dit",
        layout=layout,
        config_hash=digest,
        sites=network.sites,
        depth=network.depth,
        latent_channels=pipeline.vae.config.latent_channels,
        latent_scale=scale,
        patch_size=1 if unet else config["patch_size"],
        native_width=extras.get("native_width", width * scale),
        native_height=extras.get("native_height", height * scale),
        schedulers=supported(pipeline.scheduler.config),
        default_scheduler=extras.get("default_scheduler", scheduler),
        default_steps=extras.get("default_num_inference_steps", 25),
        default_guidance_scale=extras.get("default_guidance_scale", DEFAULT_SCALES[layout]),
        itemsize=dtype.itemsize,
        latent_itemsize=max(dtype.itemsize, 4) if stepping == "batched" else dtype.itemsize,
        num_train_timesteps=pipeline.scheduler.config.num_train_timesteps,
        num_classes=config["num_embeds_ada_norm"] if layout == "dit" else None,
        has_text_encoder=getattr(pipeline, "text_encoder", None) is not None,
        examples=tuple(extras.get("examples", ())),
        **given,
    )


__all__ = ["BUNDLED", "LAYOUTS", "Backbone", "config_hash", "load"]
