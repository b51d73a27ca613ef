"""The text encoders: a CLIP text model for shapes-sd, a T5 encoder for shapes-dit.

Both are trained before the denoiser, with heads that are thrown away: cross-attention with one learned query per place
must read what stands there (left, right, top, bottom, centre) and the background's colour. A frozen encoder whose
tokens already say where everything is lets the denoiser spend its training on pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from models.shapes.shapes import COLOURS, RADII, SHAPES, Scene, sample_scenes
from models.shapes.tokenizers import MAX_TOKENS, clip_tokenizer, t5_tokenizer

WIDTH = 128
EMPTY_SHARE = 0.05
_PLACES = {
    "to the left of": ("left", "right"),
    "to the right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
    None: ("centre",),
}
_ATTRIBUTES: dict[str, Sequence[str]] = {"size": list(RADII), "colour": list(COLOURS), "shape": SHAPES}
_QUESTIONS = [(place, attribute) for place in ("left", "right", "top", "bottom", "centre") for attribute in _ATTRIBUTES]
_ANSWERS = [1 + len(_ATTRIBUTES[attribute]) for _, attribute in _QUESTIONS] + [1 + len(COLOURS)]  # 0: nothing there


@dataclass(frozen=True)
class Encoded:
    """Captions as the denoiser sees them: `tokens` [captions, MAX_TOKENS, WIDTH], `mask` [captions, MAX_TOKENS]."""

    tokens: Tensor
    mask: Tensor


class TextEncoder(nn.Module):
    """One of the two encoders with its tokenizer; the call gives the tokens and the mask of what is not padding.

    `folder` holds a trained network in transformers' layout; without it the network is new.
    """

    def __init__(self, family: str, folder: Path | None = None, further: Sequence[str] = ()) -> None:
        super().__init__()
        self.masked = family == "t5"
        self.tokenizer: Any = t5_tokenizer() if self.masked else clip_tokenizer(further)
        if folder is not None:
            self.network: Any = (T5EncoderModel if self.masked else CLIPTextModel).from_pretrained(folder)
        else:
            self.network = _t5(len(self.tokenizer)) if self.masked else _clip(self.tokenizer)

    def forward(self, captions: Sequence[str]) -> Encoded:
        device = next(self.network.parameters()).device
        inputs = self.tokenizer(
            list(captions), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).to(device)
        mask = inputs.attention_mask if self.masked else None
        tokens = self.network(inputs.input_ids, attention_mask=mask).last_hidden_state
        return Encoded(tokens, mask if mask is not None else torch.ones_like(inputs.input_ids))


def _clip(tokenizer: Any) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _t5(vocabulary: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=32,
        d_ff=2 * WIDTH,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def with_words(folder: Path, further: Sequence[str]) -> TextEncoder:
    """The CLIP text encoder in `folder`, in float32, that knows `further` words too: new ones unless it has them."""
    wider = TextEncoder("clip", further=further)
    weights = CLIPTextModel.from_pretrained(folder, torch_dtype=torch.float32).state_dict()
    name = "embeddings.token_embedding.weight"
    if len(weights[name]) != len(wider.tokenizer):
        table = wider.network.state_dict()[name].clone()
        known = wider.tokenizer.get_vocab()
        for piece, number in clip_tokenizer().get_vocab().items():
            table[known[piece]] = weights[name][number]
        weights[name] = table
    wider.network.load_state_dict(weights)
    return wider


class _Reader(nn.Module):
    """The encoder with its throw-away heads."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.encoder = TextEncoder(family)
        self.queries = nn.Parameter(torch.randn(len(_ANSWERS), WIDTH))
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, answers) for answers in _ANSWERS)

    def forward(self, captions: Sequence[str]) -> list[Tensor]:
        encoded = self.encoder(captions)
        scores = self.queries @ self.key(encoded.tokens).transpose(1, 2) / WIDTH**0.5  # [captions, questions, tokens]
        scores = scores.masked_fill(encoded.mask[:, None] == 0, float("-inf"))
        read = scores.softmax(dim=-1) @ encoded.tokens  # [captions, questions, WIDTH]
        return [head(read[:, index]) for index, head in enumerate(self.heads)]


class TextTask:
    """Cross-entropy of every question, over captions and now and then the empty one."""

    def __init__(self, family: str, device: torch.device, batch: int = 128, lr: float = 1e-3) -> None:
        self.name = f"text-{family}"
        self.module = _Reader(family).to(device)
        self._batch, self._lr = batch, lr

    def optimizers(self) -> Sequence[Optimizer]:
        return [torch.optim.AdamW(self.module.parameters(), lr=self._lr, weight_decay=0.01)]

    def loss(self, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**31, (1,), generator=generator))
        scenes: list[Scene | None] = list(islice(sample_scenes(seed, held_out=False, pair_share=0.75), self._batch))
        scenes[: int(EMPTY_SHARE * self._batch)] = [None] * int(EMPTY_SHARE * self._batch)
        return _mean_loss(*self._answer(scenes))

    @torch.no_grad()
    def preview(self, folder: Path, step: int) -> str:
        logits, targets = self._answer(list(islice(sample_scenes(3, held_out=True, pair_share=0.75), 512)))
        right = torch.stack([one.argmax(-1) == targets[:, index] for index, one in enumerate(logits)], dim=1)
        return f"every answer right for {right.all(dim=1).float().mean().item():.1%} of held-out captions"

    def _answer(self, scenes: Sequence[Scene | None]) -> tuple[list[Tensor], Tensor]:
        logits = self.module([scene.caption if scene else "" for scene in scenes])
        return logits, torch.tensor([_answers(scene) for scene in scenes], device=logits[0].device)


def _mean_loss(logits: list[Tensor], targets: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(one, targets[:, index]) for index, one in enumerate(logits)]).mean()


def _answers(scene: Scene | None) -> list[int]:
    """The right answer to every question about a scene; all nothing for the empty caption."""
    if scene is None:
        return [0] * len(_ANSWERS)
    things = dict(zip(_PLACES[scene.relation], scene.things, strict=True))
    found = [
        1 + list(_ATTRIBUTES[attribute]).index(getattr(things[place], attribute)) if place in things else 0
        for place, attribute in _QUESTIONS
    ]
    return [*found, 1 + list(COLOURS).index(scene.background)]
