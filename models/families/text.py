"""What families that take text share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.errors import OutOfRange, RequestError, WrongBackbone
from models.families.base import Family, Parts
from models.guidance import CONDITIONAL
from models.request import Request, Run
from models.reuse.plans import Role
from models.reuse.rows import Conditioning

UNCONDITIONAL: Role = "unconditional"


class TextFamily(Family):
    """A family with a prompt and a negative prompt, one row each; either may come as embeddings."""

    inputs = frozenset({"negative_prompt", "prompt_embeds", "negative_prompt_embeds"})
    usual_text_tokens = 77

    @abstractmethod
    def encode_texts(self, parts: Parts, texts: list[str]) -> Conditioning:
        """Texts to tensors [texts, ...] by diffusers' own `encode_prompt`."""

    def given(self, parts: Parts, embeds: Tensor, mask: Tensor | None, pooled: Tensor | None) -> Conditioning:
        """Embeddings of a request as `encode_texts` would give them. Raises a `RequestError`."""
        return {"encoder_hidden_states": checked(embeds, self.text_dim(parts.config)).to(parts.device, parts.dtype)}

    def text_dim(self, config: Mapping[str, object]) -> int:
        """The width of a prompt's embeddings."""
        return int(config["cross_attention_dim"])  # type: ignore[call-overload, no-any-return]

    def zeros_for_no_prompt(self, parts: Parts, request: Request) -> bool:
        """Whether zeros stand for the negative prompt."""
        return False

    def aligned(self, parts: Parts, rows: dict[Role, Conditioning]) -> dict[Role, Conditioning]:
        """The rows of a run as they can share a forward. Raises a `RequestError` where they cannot."""
        if UNCONDITIONAL in rows:
            check_alike(rows[CONDITIONAL], rows[UNCONDITIONAL])
        return rows

    def beside(self, parts: Parts, run: Run) -> Conditioning:
        """What every row of a run is conditioned on beside its text."""
        return {}

    def prompts(self, parts: Parts, run: Run) -> list[str]:
        """See `Family`."""
        request, texts = run.request, []
        if request.prompt_embeds is None:
            texts.append(request.prompt or "")
        if run.guided and request.negative_prompt_embeds is None and not self.zeros_for_no_prompt(parts, request):
            texts.append(request.negative_prompt or "")
        return texts

    def encode(self, parts: Parts, texts: Sequence[str]) -> list[Conditioning]:
        """See `Family`; what was encoded lately is not encoded again."""

        def encode(missing: list[str]) -> Conditioning:
            with parts.encoding():
                return self.encode_texts(parts, missing)

        return parts.prompts.encode(texts, encode, parts.styled)

    def conditioning(self, parts: Parts, run: Run) -> dict[Role, Conditioning]:
        """See `Family`."""
        request = run.request
        if request.prompt_embeds is not None:
            mask, pooled = request.prompt_attention_mask, request.pooled_prompt_embeds
            rows = {CONDITIONAL: self.given(parts, request.prompt_embeds, mask, pooled)}
        else:
            rows = {CONDITIONAL: self.encode(parts, [request.prompt or ""])[0]}
        if run.guided:
            rows[UNCONDITIONAL] = self._negative(parts, request, rows[CONDITIONAL])
        rows = self.aligned(parts, rows)
        beside = self.beside(parts, run)
        return {role: {**row, **beside} for role, row in rows.items()}

    def _negative(self, parts: Parts, request: Request, conditional: Conditioning) -> Conditioning:
        if request.negative_prompt_embeds is not None:
            mask, pooled = request.negative_prompt_attention_mask, request.negative_pooled_prompt_embeds
            try:
                return self.given(parts, request.negative_prompt_embeds, mask, pooled)
            except RequestError as error:
                raise type(error)(f"negative_{error.field}", error.reason) from None
        if self.zeros_for_no_prompt(parts, request):
            return {name: torch.zeros_like(tensor) for name, tensor in conditional.items()}
        if not parts.encoders():
            raise WrongBackbone("negative_prompt_embeds", "are needed for guidance: the model has no text encoder")
        return self.encode(parts, [request.negative_prompt or ""])[0]


def checked(embeds: Tensor, dim: int) -> Tensor:
    """Embeddings of one prompt [1, tokens, dim]. Raises `OutOfRange`."""
    if embeds.ndim != 3 or len(embeds) != 1 or embeds.shape[2] != dim:
        raise OutOfRange("prompt_embeds", f"shape {tuple(embeds.shape)} is not (1, tokens, {dim})")
    return embeds


def checked_pooled(pooled: Tensor | None, dim: int) -> Tensor:
    """A pooled prompt [1, dim]. Raises a `RequestError`."""
    if pooled is None:
        raise RequestError("pooled_prompt_embeds", "this model needs them beside the prompt's embeddings")
    if tuple(pooled.shape) != (1, dim):
        raise OutOfRange("pooled_prompt_embeds", f"shape {tuple(pooled.shape)} is not (1, {dim})")
    return pooled


def check_alike(conditional: Conditioning, unconditional: Conditioning) -> None:
    """Both rows go through one forward. Raises a `RequestError` where they cannot."""
    for name in conditional.keys() | unconditional.keys():
        sizes = [tuple(row[name].shape) if name in row else None for row in (unconditional, conditional)]
        if None in sizes:
            raise RequestError("negative_prompt_embeds", f"only one of the guided rows is conditioned on {name}")
        if sizes[0] != sizes[1]:
            raise OutOfRange("negative_prompt_embeds", f"its {name} are {sizes[0]}, those of the prompt {sizes[1]}")
