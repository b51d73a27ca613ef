"""One network as teacher and student: adapter off and guided in two rows, adapter on and conditional in one.

LoRA-enhanced distillation of guidance (Golnari et al., arXiv:2312.00899): no second copy of the weights at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.adapters.lora import TARGETS, WEIGHT_NAME
from models.guidance import guided
from models.reuse.rows import Conditioning


class Pair:
    """The teacher and the student in one frozen network with one trainable adapter of rank `rank`."""

    def __init__(self, network: nn.Module, guidance_scale: float, rank: int, seed: int = 0) -> None:
        self.network: Any = network.requires_grad_(False)
        self.guidance_scale = guidance_scale
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
            inject_adapter_in_model(config, self.network)  # diffusers' own `add_adapter` is not there for PixArt
        self._layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The adapter's weights: all that is trained."""
        return [parameter for name, parameter in self.network.named_parameters() if "lora_" in name]

    def student(self, x: Tensor, t: Tensor, conditional: Conditioning) -> Tensor:
        """One row an image: the prediction with the adapter, for latents x [rows, channels, h, w] at times t [rows]."""
        return predict(self.network, x, t, conditional)

    def teacher(
        self, x: Tensor, t: Tensor, conditional: Conditioning, unconditional: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """Two rows an image, no gradient: the guided prediction without the adapter, and its conditional half."""
        both = {name: torch.cat([unconditional[name], value]) for name, value in conditional.items()}
        with torch.no_grad(), self._without_adapter():
            free, wanted = predict(self.network, x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        return guided(wanted, free, self.guidance_scale), wanted

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)

    def load(self, files: Sequence[Path]) -> None:
        """Take the mean, tensor by tensor, of files that `save` wrote for adapters of the same rank."""
        parts = [load_file(file) for file in files]
        weights = {
            name.split(".", 1)[1]: torch.stack([part[name].float() for part in parts]).mean(0) for name in parts[0]
        }
        set_peft_model_state_dict(self.network, convert_all_state_dict_to_peft(weights))

    def save(self, folder: Path, metadata: Mapping[str, object]) -> Path:
        """Write the adapter as a standard LoRA file in half precision: what diffusers' own loaders read."""
        weights = get_peft_model_state_dict(self.network)
        prefix = "transformer"
        if not isinstance(self.network, PixArtTransformer2DModel):
            weights, prefix = convert_state_dict_to_diffusers(weights), "unet"
        tensors = {f"{prefix}.{name}": value.detach().half().cpu().contiguous() for name, value in weights.items()}
        folder.mkdir(parents=True, exist_ok=True)
        header = {"format": "pt"} | {name: str(value) for name, value in metadata.items()}
        save_file(tensors, folder / WEIGHT_NAME, header)
        return folder / WEIGHT_NAME


def predict(network: Any, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """diffusers' own forward, with gradient: x [rows, channels, h, w] at times t [rows] to a prediction like x."""
    given = dict(conditioning)
    options: dict[str, Any] = {"encoder_hidden_states": given.pop("encoder_hidden_states")}
    if isinstance(network, PixArtTransformer2DModel):
        options["encoder_attention_mask"] = given.pop("encoder_attention_mask")
        options["added_cond_kwargs"] = {name: given.get(name) for name in ("resolution", "aspect_ratio")}
    elif given:
        options["added_cond_kwargs"] = given
    prediction: Tensor = network(x, timestep=t, return_dict=False, **options)[0]
    return prediction[:, : x.shape[1]]  # a learned variance, which these schedulers do not use, is cut off


def join(parts: Sequence[Conditioning]) -> Conditioning:
    """Conditioning of [1, ...] tensors as one batch of tensors that may take part in a backward pass."""
    return {name: torch.cat([part[name] for part in parts]).clone() for name in parts[0]}
