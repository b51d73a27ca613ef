"""What a preview shows: the picture that the run is heading to, of the right image, whatever the network predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import Backbone
from models.reuse.rows import Conditioning, Row
from tests.faked import opened
from tests.serving import Hook, aio, events, serving

Student = Callable[..., Backbone]


class Oracle(Hook):
    """A network that knows the clean latents of every image: they depend on its seed alone."""

    def __init__(self, network: Any, alphas: Tensor, kind: str) -> None:
        super().__init__(network, lambda _: None)
        self._alphas, self._kind = alphas, kind

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row], *rest: Any) -> Tensor:
        """Predict, in the given kind, what leads to the clean latents."""
        clean = torch.stack([self._clean(row.owner.generator.initial_seed(), x[0]) for row in rows])  # type: ignore[attr-defined]
        signal = self._alphas[t.round().long()].sqrt().view(-1, 1, 1, 1)
        noise = (1 - signal**2).sqrt()
        if self._kind == "sample":
            return clean
        eps = (x - signal * clean) / noise
        return signal * eps - noise * clean if self._kind == "v_prediction" else eps

    def _clean(self, seed: int, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(1000 + seed))


def foresighted(backbone: Backbone, kind: str) -> Backbone:
    """The same model with an oracle as its network."""
    config = {**backbone.scheduler_config, "prediction_type": kind}
    betas = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000) ** 2
    alphas = (1 - betas).cumprod(0)
    return replace(backbone, network=Oracle(backbone.network, alphas, kind), scheduler_config=config)


def numbers(b64_json: str) -> Any:
    return np.asarray(opened(b64_json).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [("epsilon", "ddim"), ("v_prediction", "ddim"), ("sample", "ddim"), ("epsilon", "euler"), ("epsilon", "dpmpp_2m")],
)
def test_previews_show_where_each_image_is_heading(student_of: Student, kind: str, scheduler: str) -> None:
    @aio
    async def test() -> None:
        async with serving({"sd": foresighted(student_of("sd"), kind)}) as served:
            size: dict[str, Any] = {"width": 16, "height": 32, "num_images": 3, "num_inference_steps": 6}
            answer = await served.post(stream=True, partial_images=2, seed=40, scheduler=scheduler, **size)
        found = events(answer.text)
        previews = [data for name, data in found if name == "partial_image"]
        images = [numbers(image["b64_json"]) for image in found[-1][1]["images"]]
        assert {(data["index"], data["step"]) for data in previews} == {(i, s) for i in range(3) for s in (2, 4)}
        apart = min(np.abs(a - b).mean() for a, b in zip(images, images[1:] + images[:1], strict=True))
        for data in previews:
            assert opened(data["b64_json"]).size == (16, 32)
            assert opened(data["b64_json"]).text["seed"] == str(40 + data["index"])  # type: ignore[attr-defined]
            assert np.abs(numbers(data["b64_json"]) - images[data["index"]]).mean() < apart / 5

    test()
