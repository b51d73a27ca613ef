"""One network as teacher and student: adapter off and guided in two rows, adapter on and conditional in one.

LoRA-enhanced distillation of guidance (Golnari et al., arXiv:2312.00899): no second copy of the weights at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.adapters.lora import TARGETS, WEIGHT_NAME
from models.conditioning import stack
from models.families import Family
from models.guidance import CONDITIONAL, Scales
from models.reuse.rows import Conditioning


class Pair:
    """The teacher and the student in one frozen network with one trainable adapter of rank `rank`."""

    def __init__(self, family: Family, network: nn.Module, guidance_scale: float, rank: int, seed: int = 0) -> None:
        self._family = family
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
        return self._predict(x, t, conditional)

    def teacher(
        self, x: Tensor, t: Tensor, conditional: Conditioning, unconditional: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """Two rows an image, no gradient: the guided prediction without the adapter, and its conditional half."""
        both = stack([unconditional, conditional])
        with torch.no_grad(), self._without_adapter():
            free, wanted = self._predict(x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        rows = {"unconditional": free, CONDITIONAL: wanted}
        return self._family.guidance.combine(rows, Scales(self.guidance_scale)), wanted

    def _predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        prediction = self._family.forward(self.network, x, t, conditioning)
        return prediction[:, : x.shape[1]]  # a learned variance, which these schedulers do not use, is cut off

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
        if self._family.kind == "unet":
            weights = convert_state_dict_to_diffusers(weights)
        tensors = {
            f"{self._family.part}.{name}": value.detach().half().cpu().contiguous() for name, value in weights.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        header = {"format": "pt"} | {name: str(value) for name, value in metadata.items()}
        save_file(tensors, folder / WEIGHT_NAME, header)
        return folder / WEIGHT_NAME


def join(parts: Sequence[Conditioning]) -> Conditioning:
    """Conditioning of [1, ...] tensors as one batch of tensors that may take part in a backward pass."""
    return {name: tensor.clone() for name, tensor in stack(parts).items()}
