"""Text, class and size to the tensors a network is conditioned on, through diffusers' own `encode_prompt`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import nn

from models.errors import OutOfRange, RequestError, WrongBackbone
from models.request import Request, Run
from models.reuse.plans import Role
from models.reuse.rows import Conditioning
from models.spec import Layout

CACHED_PROMPTS = 1024


class Conditioner:
    """Conditioning of one model. `encode` has an LRU of prompts; everything else is arithmetic."""

    def __init__(
        self, pipeline: Any, layout: Layout, dtype: torch.dtype, device: torch.device, text_tokens: int | None = None
    ) -> None:
        """`text_tokens`: the length PixArt's prompts are padded to, where it is not the usual one."""
        self._pipeline = pipeline
        usual: int | None = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}.get(type(pipeline).__name__)
        tokenizer = getattr(pipeline, "tokenizer", None)
        self.text_tokens: int = text_tokens or usual or int(getattr(tokenizer, "model_max_length", 77))
        self._layout = layout
        self._dtype = dtype
        self._device = device
        self._cache: OrderedDict[str, Conditioning] = OrderedDict()
        self._lock = Lock()

    def modules(self) -> list[nn.Module]:
        """The text encoders."""
        encoders = (getattr(self._pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))
        return [encoder for encoder in encoders if encoder is not None]

    def of(self, run: Run) -> dict[Role, Conditioning]:
        """The conditioning of both rows of a run, of [1, ...] tensors; the unconditional only where it is guided."""
        if self._layout == "dit":
            return self._class(run)
        conditional = self._given(run.request) or self.encode([run.request.prompt])[0]
        result: dict[Role, Conditioning] = {"conditional": conditional}
        if run.guided:
            result["unconditional"] = self._negative(run.request, conditional)
            self._check_alike(conditional, result["unconditional"])
        for conditioning in result.values():
            conditioning |= self._size(run)
        return result

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str | None]) -> list[Conditioning]:
        """Encode prompts, those not in the cache as one batch. Each result is a fresh dict of [1, ...] tensors."""
        texts = [prompt or "" for prompt in prompts]
        with self._lock:
            found = {text: self._cache[text] for text in texts if text in self._cache}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if missing:
            batch = self._encode(missing)
            found |= {text: {k: v[i : i + 1].clone() for k, v in batch.items()} for i, text in enumerate(missing)}
        with self._lock:
            for text in texts:
                self._cache[text] = found[text]
                self._cache.move_to_end(text)
            while len(self._cache) > CACHED_PROMPTS:
                self._cache.popitem(last=False)
        return [dict(found[text]) for text in texts]

    def _encode(self, texts: list[str]) -> Conditioning:
        pipeline = self._pipeline
        options: dict[str, Any] = {"device": self._device, "do_classifier_free_guidance": False}
        if self._layout == "sdxl":
            embeds, _, pooled, _ = pipeline.encode_prompt(texts, num_images_per_prompt=1, **options)
            return {"encoder_hidden_states": embeds, "text_embeds": pooled}
        if self._layout == "pixart":
            embeds, mask, _, _ = pipeline.encode_prompt(texts, max_sequence_length=self.text_tokens, **options)
            return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        embeds, _ = pipeline.encode_prompt(texts, num_images_per_prompt=1, **options)
        return {"encoder_hidden_states": embeds}

    @staticmethod
    def _check_alike(conditional: Conditioning, unconditional: Conditioning) -> None:
        """Both rows go through one forward."""
        for name, tensor in conditional.items():
            if (given := tuple(unconditional[name].shape)) != tuple(tensor.shape):
                reason = f"its {name} are {given}, those of the prompt {tuple(tensor.shape)}"
                raise OutOfRange("negative_prompt_embeds", reason)

    def _given(self, request: Request) -> Conditioning | None:
        if request.prompt_embeds is None:
            return None
        mask, pooled = request.prompt_attention_mask, request.pooled_prompt_embeds
        return self._tensors(request.prompt_embeds, mask, pooled)

    def _negative(self, request: Request, conditional: Conditioning) -> Conditioning:
        if request.negative_prompt_embeds is not None:
            mask, pooled = request.negative_prompt_attention_mask, request.negative_pooled_prompt_embeds
            return self._tensors(request.negative_prompt_embeds, mask, pooled)
        zeros = self._layout == "sdxl" and self._pipeline.config.force_zeros_for_empty_prompt
        if zeros and not request.negative_prompt:
            return {k: torch.zeros_like(v) for k, v in conditional.items()}
        if not self.modules():
            raise WrongBackbone("negative_prompt_embeds", "are needed for guidance: the model has no text encoder")
        return self.encode([request.negative_prompt])[0]

    def _tensors(self, embeds: torch.Tensor, mask: torch.Tensor | None, pooled: torch.Tensor | None) -> Conditioning:
        wanted = self._embeds_dim()
        if embeds.ndim != 3 or len(embeds) != 1 or embeds.shape[2] != wanted:
            raise OutOfRange("prompt_embeds", f"shape {tuple(embeds.shape)} is not (1, tokens, {wanted})")
        given: Conditioning = {"encoder_hidden_states": embeds.to(self._device, self._dtype)}
        if self._layout == "pixart":
            given["encoder_attention_mask"] = (torch.ones(embeds.shape[:2]) if mask is None else mask).to(self._device)
        if self._layout == "sdxl":
            if pooled is None:
                raise RequestError("pooled_prompt_embeds", "this model needs them beside prompt_embeds")
            given["text_embeds"] = pooled.to(self._device, self._dtype)
        return given

    def _embeds_dim(self) -> int:
        unet = self._layout in ("sd", "sdxl")
        config = (self._pipeline.unet if unet else self._pipeline.transformer).config
        return int(config.cross_attention_dim if unet else config.caption_channels)

    def _size(self, run: Run) -> Conditioning:
        size = (run.height, run.width)
        if self._layout == "sdxl":
            # Original size, crop corner and target size, as SDXL was trained with (Podell et al., 2023).
            return {"time_ids": torch.tensor([[*size, 0, 0, *size]]).to(self._device, self._dtype)}
        if self._layout == "pixart" and self._pipeline.transformer.config.sample_size == 128:
            resolution = torch.tensor([size]).to(self._device, self._dtype)
            ratio = torch.tensor([[float(run.height / run.width)]]).to(self._device, self._dtype)
            return {"resolution": resolution, "aspect_ratio": ratio}
        return {}

    def _class(self, run: Run) -> dict[Role, Conditioning]:
        count = self._pipeline.transformer.config.num_embeds_ada_norm
        label = run.request.class_label
        if label is None or not 0 <= label < count:
            raise OutOfRange("class_label", f"{label} is not in 0..{count - 1}")
        roles: dict[Role, int] = {"conditional": label}
        if run.guided:
            roles["unconditional"] = count
        return {role: {"class_labels": torch.tensor([value], device=self._device)} for role, value in roles.items()}
