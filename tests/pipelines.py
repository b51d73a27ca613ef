"""Small random-weight pipelines in diffusers' layout, made in seconds: the tests' stand-ins for the five families."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from models.adapters.lora import TARGETS, WEIGHT_NAME
from models.shapes.tokenizers import clip_tokenizer, t5_tokenizer

LAYOUTS = ("sd", "sd2", "sdxl", "dit", "pixart-alpha", "pixart-sigma")
TEXT_LAYOUTS = tuple(layout for layout in LAYOUTS if layout != "dit")
UNETS = ("sd", "sd2", "sdxl")
JOINT = ("flux-dev", "flux-schnell", "sd3", "sd3.5", "klein-base", "klein", "z-image")
"""Transformers over text and image tokens, under flow matching; their sizes are said beside them."""
INPAINT = ("sd-inpaint", "sdxl-inpaint")
"""U-Nets of nine input channels, which fill in masked parts of pictures."""


def _vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        **options,
    )


def _scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def _unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": 16,
            "block_out_channels": (16, 32, 32),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 2,
            "cross_attention_dim": 32,
            "norm_num_groups": 4,
            **options,
        }
    )


def _clip(width: int = 32, projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def _t5(dim: int = 32) -> T5EncoderModel:
    config = T5Config(vocab_size=len(t5_tokenizer()), d_model=dim, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return T5EncoderModel(config)


def _sd(prediction_type: str = "epsilon", **options: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=clip_tokenizer(),
        unet=_unet(**options),
        scheduler=_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd_inpaint() -> StableDiffusionInpaintPipeline:
    components = _sd(in_channels=9, layers_per_block=1).components
    return StableDiffusionInpaintPipeline(**components, requires_safety_checker=False)


def _sdxl_inpaint() -> StableDiffusionXLInpaintPipeline:
    return StableDiffusionXLInpaintPipeline(**_sdxl(in_channels=9).components, add_watermarker=False)


def _instruct_pix2pix() -> StableDiffusionInstructPix2PixPipeline:
    components = _sd(in_channels=8).components
    return StableDiffusionInstructPix2PixPipeline(**components, requires_safety_checker=False)


def _sdxl(**options: Any) -> StableDiffusionXLPipeline:
    unet = _unet(
        **options,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(24),  # of unlike widths, by which a single file's two are told apart
        text_encoder_2=_clip(40, projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=_scheduler(),
        add_watermarker=False,
    )


def _dit() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        sample_size=16,
        num_layers=6,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer=transformer, vae=_vae(), scheduler=_scheduler())


def _pixart(sigma: bool, **options: Any) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        **{
            "sample_size": 16,
            "num_layers": 6,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "in_channels": 4,
            "out_channels": 8 if sigma else 4,
            "cross_attention_dim": 32,
            "caption_channels": 32,
            "use_additional_conditions": False,
            **options,
        }
    )
    cls = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    return cls(
        tokenizer=t5_tokenizer(), text_encoder=_t5(), vae=_vae(), transformer=transformer, scheduler=_scheduler()
    )


def _flow_scheduler(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, **options)


def _flux(guidance: bool) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=_flow_scheduler(use_dynamic_shifting=guidance),
        vae=_vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=_clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def _sd3(**options: Any) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        **{
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 64,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 16,
            **options,
        }
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=_flow_scheduler(),
        vae=_vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=_clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(64),
        tokenizer_3=t5_tokenizer(),
    )


def _qwen_tokenizer() -> Qwen2Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: index for index, piece in enumerate([*letters, *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=special[1:])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
        "{% if not enable_thinking %}.{% endif %}"
    )
    return tokenizer


def _qwen(layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(_qwen_tokenizer()),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


def _klein(distilled: bool) -> Flux2KleinPipeline:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    torch.nn.init.normal_(vae.bn.running_mean, std=0.3)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return Flux2KleinPipeline(
        scheduler=_flow_scheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(_qwen(28)),
        tokenizer=_qwen_tokenizer(),
        transformer=transformer,
        is_distilled=distilled,
    )


def _z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    return ZImagePipeline(
        scheduler=_flow_scheduler(),
        vae=_vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=Qwen3Model(_qwen(2)),
        tokenizer=_qwen_tokenizer(),
        transformer=transformer,
    )


_MAKERS: dict[str, Any] = {
    "sd": _sd,
    "sd2": lambda: _sd(
        "v_prediction",
        use_linear_projection=True,
        attention_head_dim=(2, 4),
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "instruct-pix2pix": _instruct_pix2pix,
    "sdxl": _sdxl,
    "sd-inpaint": _sd_inpaint,
    "sdxl-inpaint": _sdxl_inpaint,
    "dit": _dit,
    "flux-dev": lambda: _flux(guidance=True),
    "flux-schnell": lambda: _flux(guidance=False),
    "klein-base": lambda: _klein(distilled=False),
    "klein": lambda: _klein(distilled=True),
    "z-image": _z_image,
    "sd3": _sd3,
    "sd3.5": lambda: _sd3(num_layers=4, dual_attention_layers=(0, 2), qk_norm="rms_norm"),
    "pixart-alpha": lambda: _pixart(sigma=False),
    "pixart-sigma": lambda: _pixart(sigma=True),
    "pixart-alpha-1024": lambda: _pixart(
        sigma=False,
        sample_size=128,
        num_layers=2,
        attention_head_dim=12,
        cross_attention_dim=48,
        use_additional_conditions=True,
    ),
}


def save_pipeline(layout: str, directory: Path) -> Path:
    """Save the small pipeline of a layout under `directory`; random weights from a fixed seed, nothing left at zero."""
    torch.manual_seed(0)
    pipeline = _MAKERS[layout]()
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    for name, parameter in network.named_parameters():
        if "adaln" in name or "norm1.linear" in name or parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    pipeline.save_pretrained(directory / layout, safe_serialization=True)
    if layout in JOINT:
        tokens = {"sd3": 48, "sd3.5": 48, "z-image": 64}.get(layout, 24)
        said = {"native_width": 32, "native_height": 32, "max_sequence_length": tokens}
        (directory / layout / "slipstream.json").write_text(json.dumps(said))
    return directory / layout


def save_adapter(network: Any, folder: Path, *, rank: int = 2, alpha: float | None = None, **metadata: object) -> Path:
    """Save a random guidance student for a network as PEFT and diffusers would, with `metadata` in its header."""
    network = copy.deepcopy(network)
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(TARGETS), init_lora_weights=False)
    torch.manual_seed(1)
    inject_adapter_in_model(config, network)
    weights, prefix = get_peft_model_state_dict(network), "transformer"
    if hasattr(network, "down_blocks"):
        weights, prefix = convert_state_dict_to_diffusers(weights), "unet"
    tensors = {f"{prefix}.{name}": value.float().contiguous() for name, value in weights.items()}
    header = {"format": "pt"} | {name: str(value) for name, value in metadata.items()}
    if alpha is not None:
        settings = {f"{prefix}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
        header["lora_adapter_metadata"] = json.dumps(settings)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHT_NAME, header)
    return folder
