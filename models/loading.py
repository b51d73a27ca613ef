"""Loading a bundled name, a directory, a hub id or one safetensors file: no pickle, no code from a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn

from models.adapters.control import MOST, info, load_control
from models.adapters.files import load_lora
from models.adapters.registry import Adapters
from models.backbone import Backbone, Stepping
from models.device import auto_dtype, find_device
from models.errors import ModelLoadError
from models.families import Family, Parts, of_pipeline
from models.families.prompts import PromptCache
from models.networks.base import Network
from models.networks.control import ControlNet
from models.networks.unet import UNet, truncate
from models.profiles import Profile
from models.profiles.files import load_profile
from models.search.attention_plan import Plan
from models.solvers.flow import is_flow
from models.solvers.names import default_name, supported
from models.spec import ModelSpec, short_name

BUNDLED = Path(__file__).parent / "bundled"
WANTED = ("*.json", "*.txt", "*.model", "*/*.safetensors")
"""What is taken of a repository of the hub: weights of the parts, not whole checkpoints beside them."""
UNWANTED = ("*.fp16.*", "*.non_ema.*", "safety_checker/*")
"""The same weights once more, and what is never loaded."""


def load(
    name: str,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    depth: int | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    controls: Mapping[str, str | Path] | None = None,
    plans: Mapping[str, str | Path | Plan] | None = None,
    profiles: Mapping[str, str | Path | Profile] | None = None,
    config: str | Path | None = None,
    compile: bool = False,
    stepping: Stepping | Literal["auto"] = "auto",
    offload_text_encoders: bool = False,
    batch_invariant: bool = False,
    max_adapter_bytes: int | None = None,
) -> Backbone:
    """Load a model: a bundled name, a directory in diffusers' layout, a hub id, or one `.safetensors` file.

    `depth` loads only the first input blocks of a U-Net and their output blocks (depth-skip as a load option): what
    lies deeper never reaches memory, and students beside the model, distilled from all of it, stay where they are.
    `adapters`, `plans` and `profiles` add to those found beside the model, by name.
    `controls` are directories of diffusers' `ControlNetModel`s for a U-Net on text, by name.
    `stepping`: `exact` lets diffusers' schedulers take their own steps, bit for bit its pipelines; `batched` steps all
    trajectories of a tick together, latents in float32; `auto` is exact on a CPU in float32 and above, else batched.
    `config`, for a single file: a directory in diffusers' layout with the configs and tokenizers of its family.
    `compile` compiles the repeated blocks (torch.compile, any batch size); what differs by row stays out of the graphs.
    `offload_text_encoders` keeps them on the host and has them on the device only while they encode.
    `batch_invariant` computes every picture and prompt by itself: the same bits, whatever else is asked for meanwhile.
    `max_adapter_bytes` bounds the adapters that stay on the device: the ones used longest ago leave it, and come back.
    Raises `ModelLoadError` where the files are not a servable model, with the config key that is not implemented, and
    for a `dtype` or `stepping` that there is not.
    """
    if stepping not in ("auto", *get_args(Stepping)):
        raise ModelLoadError(f"stepping: {stepping!r} is not auto, {' or '.join(get_args(Stepping))}")
    source = _locate(name, config)
    device = find_device(device)
    dtype = _dtype(dtype, device)
    index = _json(source.directory / "model_index.json")
    family = _family(name, index)
    known = _json(source.directory / family.part / "config.json")
    family.check(index, known)
    overrides: dict[str, Any] = dict(family.unused)
    overrides |= {n: None for n in family.optional if n in index and not (source.directory / n).is_dir()}
    if depth is not None:
        overrides[family.part] = _in_part(family, source, known, depth, dtype)
    pipeline = _read(family, source, str(index["_class_name"]), dtype, overrides)
    _place(pipeline, device, offload_text_encoders)
    module = getattr(pipeline, family.part).eval()
    module.requires_grad_(False)
    family.check_latents(module.config, pipeline.vae.config.latent_channels)
    network = family.network(module)
    if compile:
        _compile_blocks(module)
    if getattr(pipeline.vae.config, "force_upcast", False) and dtype == torch.float16:
        pipeline.vae.to(torch.float32)
    extras = _extras(source.directory)
    digest = config_hash(known)
    files_of_adapters = {**(_found(source.directory, "adapters") if depth is None else {}), **(adapters or {})}
    registry = Adapters(
        lambda path, name: load_lora(path, module, digest, name, _encoders(pipeline), partial(_named, pipeline)),
        max_adapter_bytes,
    )
    for adapter, path in files_of_adapters.items():
        registry.register(path, adapter)
    steering = _controls(family, controls or {}, module, pipeline, device, dtype)
    files = {**_found(source.directory, "plans", ".json"), **(plans or {})}
    measured = {**_found(source.directory, "profiles", ".json"), **(profiles or {})}
    how: Stepping = stepping if stepping != "auto" else auto_stepping(device, dtype)
    text_tokens = extras.get("max_sequence_length") or family.text_tokens(pipeline)
    prompts = PromptCache(alone=batch_invariant)
    parts = Parts(pipeline, module.config, device, dtype, text_tokens, prompts, offload=offload_text_encoders)
    spec = _spec(short_name(name), family, digest, network, parts, extras, how).with_extras(
        registry,
        {n: p if isinstance(p, Plan) else Plan.load(p) for n, p in files.items()},
        {n: p if isinstance(p, Profile) else load_profile(p, digest, n) for n, p in measured.items()},
        {n: info(network) for n, network in steering.items()},
    )
    return Backbone(spec, family, network, parts, pipeline.scheduler.config, registry, how, batch_invariant, steering)


def _controls(
    family: Family,
    controls: Mapping[str, str | Path],
    module: Any,
    pipeline: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, ControlNet]:
    if controls and not family.controllable:
        raise ModelLoadError(f"control: only a U-Net on text is steered, and this is a model of {family.name}")
    if len(controls) > MOST:
        raise ModelLoadError(f"control: {len(controls)} networks are more than {MOST}")
    scale = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    return {name: load_control(path, name, module.config, scale, device, dtype) for name, path in controls.items()}


def _encoders(pipeline: Any) -> dict[str, nn.Module]:
    """The text encoders by name."""
    named = ((name, getattr(pipeline, name)) for name in pipeline.components if name.startswith("text_encoder"))
    return {name: encoder for name, encoder in named if encoder is not None}


def _named(pipeline: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA file's weights in diffusers' names, by what its pipeline knows of other ways to name them."""
    read = getattr(type(pipeline), "lora_state_dict", None)
    if read is None:
        return weights
    network = getattr(pipeline, "unet", None)
    found = read(dict(weights), **({} if network is None else {"unet_config": network.config}))
    return dict(found[0] if isinstance(found, tuple) else found)


def auto_stepping(device: torch.device, dtype: torch.dtype) -> Stepping:
    """Exact where bitwise parity is promised, batched where launches and half precision make it the better one."""
    return "exact" if device.type == "cpu" and dtype in (torch.float32, torch.float64) else "batched"


@dataclass(frozen=True)
class _Source:
    """Where a model lies: a directory in diffusers' layout, and the file that has its weights where that is one."""

    directory: Path
    file: Path | None = None


def _family(name: str, index: Mapping[str, Any]) -> Family:
    try:
        return of_pipeline(str(index.get("_class_name")))
    except ModelLoadError as error:
        raise ModelLoadError(f"{name}: {error}") from None


def _compile_blocks(network: torch.nn.Module) -> None:
    """Regional compilation: the blocks that repeat are compiled once a kind, in seconds instead of minutes."""
    repeated = [block for block in network.modules() if isinstance(block, ResnetBlock2D | BasicTransformerBlock)]
    if not repeated:
        raise ModelLoadError("compile: this network has no blocks that can be compiled apart")
    for block in repeated:
        block.compile(dynamic=True)


def config_hash(config: Mapping[str, Any]) -> str:
    """A short digest of a network's architecture; plans and adapters carry it to refuse a foreign base."""
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _locate(name: str, config: str | Path | None) -> _Source:
    if Path(name).suffix == ".safetensors":
        return _single_file(Path(name), config)
    if config is not None:
        raise ModelLoadError(f"{name}: a config directory is for a single .safetensors file; this has its own")
    if (BUNDLED / name / "model_index.json").is_file():
        return _Source(BUNDLED / name)
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise ModelLoadError(f"{name}: no model_index.json, this is not a directory in diffusers' layout")
        return _Source(Path(name))
    try:
        return _Source(Path(snapshot_download(name, allow_patterns=[*WANTED], ignore_patterns=[*UNWANTED])))
    except Exception as error:
        raise ModelLoadError(f"{name}: no bundled model, no directory, and the hub says: {error}") from error


def _single_file(file: Path, config: str | Path | None) -> _Source:
    if not file.is_file():
        raise ModelLoadError(f"{file}: no such file")
    if config is None:
        raise ModelLoadError(f"{file}: a single file has no configs; give a directory with those of its family")
    if not (Path(config) / "model_index.json").is_file():
        raise ModelLoadError(f"{config}: no model_index.json, this is no directory with the configs for {file}")
    return _Source(Path(config), file)


def _read(family: Family, source: _Source, class_name: str, dtype: torch.dtype, overrides: Mapping[str, Any]) -> Any:
    cls = family.pipeline(class_name)
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, **overrides}
    try:
        if source.file is None:
            pipeline = cls.from_pretrained(source.directory, use_safetensors=True, **options)
        elif hasattr(cls, "from_single_file"):
            pipeline = cls.from_single_file(str(source.file), config=str(source.directory), **options)
        else:
            raise ModelLoadError(f"{source.file}: diffusers reads no single file of a {class_name}; give a directory")
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
        place = source.directory if source.file is None else f"{source.file} with the configs in {source.directory}"
        raise ModelLoadError(f"{place}: {error}") from error
    _check_complete(pipeline, source)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _place(pipeline: Any, device: torch.device, offload_text_encoders: bool) -> None:
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and not (offload_text_encoders and name.startswith("text_encoder")):
            part.to(device)


def _check_complete(pipeline: Any, source: _Source) -> None:
    """A single file that does not fit its configs leaves weights without values."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and any(p.is_meta for p in part.parameters()):
            raise ModelLoadError(f"{source.file}: it has not all weights of {name} as configured in {source.directory}")


def _in_part(family: Family, source: _Source, config: dict[str, Any], depth: int, dtype: torch.dtype) -> Any:
    if family.kind != "unet":
        raise ModelLoadError("depth: only a U-Net can be loaded in part")
    if source.file is not None:
        raise ModelLoadError(f"depth: {source.file} cannot be loaded in part; give a directory")
    return _truncated_unet(family, source.directory / family.part, config, depth, dtype)


def _truncated_unet(family: Family, directory: Path, config: dict[str, Any], depth: int, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        unet = getattr(diffusers, family.network_class).from_config(config)
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
        return auto_dtype(device)
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelLoadError(f"dtype: {dtype!r} is not auto or one of torch's floating-point types, as float32")
    return found


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


def _spec(
    name: str,
    family: Family,
    digest: str,
    network: Network,
    parts: Parts,
    extras: dict[str, Any],
    stepping: Stepping,
) -> ModelSpec:
    config, pipeline, dtype = parts.config, parts.pipeline, parts.dtype
    _check_noise(family, pipeline.scheduler.config)
    found: dict[str, Any] = {
        "latent_channels": pipeline.vae.config.latent_channels,
        "latent_scale": 2 ** (len(pipeline.vae.config.block_out_channels) - 1),
        "default_steps": 25,
        "default_guidance_scale": family.default_guidance_scale,
        "default_image_guidance_scale": family.default_image_guidance_scale,
        **family.facts(config),
        **family.limits(pipeline),
    }
    height, width = (side * found["latent_scale"] for side in family.native_size(config))
    given: dict[str, Any] = {
        k: extras[k]
        for k in ("description", "prompt_grammar", "default_guidance_scale", "default_image_guidance_scale")
        if k in extras
    }
    if "default_num_inference_steps" in extras:
        given["default_steps"] = extras["default_num_inference_steps"]
    return ModelSpec(
        name=name,
        family=family.kind,
        layout=family.name,
        config_hash=digest,
        sites=family.sites(network, parts.text_tokens),
        depth=network.depth,
        native_width=extras.get("native_width", width),
        native_height=extras.get("native_height", height),
        schedulers=supported(pipeline.scheduler.config),
        default_scheduler=extras.get("default_scheduler", default_name(pipeline.scheduler.config)),
        itemsize=dtype.itemsize,
        latent_itemsize=max(dtype.itemsize, 4) if stepping == "batched" else dtype.itemsize,
        num_train_timesteps=pipeline.scheduler.config.num_train_timesteps,
        takes=family.takes,
        inputs=family.inputs,
        roles=family.guidance.roles,
        guided_by=family.guided_by,
        guided_above=family.guidance.above,
        flow=family.flow,
        square=family.square,
        image_to_image=family.image_to_image,
        edits=family.edits,
        has_text_encoder=getattr(pipeline, "text_encoder", None) is not None,
        examples=tuple(extras.get("examples", ())),
        **(found | given),
    )


def _check_noise(family: Family, config: Mapping[str, Any]) -> None:
    if is_flow(config) != (family.flow is not None):
        wanted = "flow matching" if family.flow else "no flow matching"
        raise ModelLoadError(
            f"scheduler: {config.get('_class_name')}; this family's networks were trained for {wanted}"
        )


__all__ = ["BUNDLED", "Backbone", "config_hash", "load"]
