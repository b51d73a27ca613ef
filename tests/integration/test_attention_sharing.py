"""DiTFastAttn and Δ-DiT against plain references: diffusers' own pipeline, its network remembering for one request.

The references hold their state in the network and compute everything, masks included. With `wa-rs+asc` both twins use
the conditional window with the conditional residual (the authors' code mixes them up on PixArt).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Backbone, Plan, Request, generate
from models.accelerators import DeltaDiT, DiTFastAttn
from models.accelerators.base import Accelerator
from models.networks.window import window_attention
from models.search.attention_plan import METHODS, Method
from tests.reference import by_pipeline, generators

STEPS, BLOCKS, TOKENS, WINDOW = 6, 6, 64, 5
Backbones = Callable[..., Backbone]
Pipelines = Callable[..., Any]
Table = Sequence[Sequence[Method]]


class Clock:
    """Counts the forwards of a network."""

    def __init__(self, network: nn.Module) -> None:
        self.step = -1
        network.register_forward_pre_hook(self._tick)

    def _tick(self, *_: Any) -> None:
        self.step += 1


class PlainSharing:
    """One self-attention under DiTFastAttn. `conditional` and `twin` are the halves of the batch."""

    def __init__(self, methods: Sequence[Method], clock: Clock, conditional: int) -> None:
        self.methods = methods
        self.clock = clock
        self.conditional = conditional
        self.output = self.residual = torch.empty(0)

    def __call__(self, attn: Any, x: Tensor, **_: Any) -> Tensor:
        method = self.methods[self.clock.step]
        if method == "ast":
            return self.output
        q, k, v = (
            proj(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for proj in (attn.to_q, attn.to_k, attn.to_v)
        )
        band = masked(q, k, v, WINDOW)
        if method.startswith("wa-rs"):
            core = band + self.residual
        else:
            core = F.scaled_dot_product_attention(q, k, v)
            self.residual = core - band if method == "full" else self._shared(core - band)
        if method.endswith("asc"):
            core = self._shared(core)
        self.output = attn.to_out[0](core.transpose(1, 2).flatten(2))
        return self.output

    def _shared(self, rows: Tensor) -> Tensor:
        return torch.cat([rows.chunk(2)[self.conditional]] * 2)


class PlainDelta(nn.Module):
    """All blocks of a transformer as one, under Δ-DiT."""

    def __init__(self, blocks: Sequence[Any], clock: Clock, interval: int, count: int, boundary: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm1 = blocks[0].norm1  # where DiTTransformer2DModel looks for its embedding
        self.clock, self.interval, self.count, self.boundary = clock, interval, count, boundary
        self.delta = torch.empty(0)

    def forward(self, h: Tensor, **kwargs: Any) -> Tensor:
        step, depth = self.clock.step, len(self.blocks)
        early = step < self.boundary
        start, stop = (depth - self.count, depth) if early else (0, self.count)
        for block in self.blocks[:start]:
            h = block(h, **kwargs)
        if step % self.interval == 0 or step == self.boundary:
            before = h
            for block in self.blocks[start:stop]:
                h = block(h, **kwargs)
            self.delta = h - before
        else:
            h = h + self.delta
        for block in self.blocks[stop:]:
            h = block(h, **kwargs)
        return h


def masked(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    position = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(position[:, None] - position).abs() <= window)


def reference(
    pipeline: Any, layout: str, guided: bool, table: Table | None, delta: tuple[int, int, int] | None = None
) -> Tensor:
    """Latents of one request with methods [step][block] and Δ-DiT's (interval, blocks, boundary)."""
    copied = copy.copy(pipeline)
    network = copied.transformer = copy.deepcopy(pipeline.transformer)
    copied.register_modules(transformer=network)
    clock = Clock(network)
    if table is not None:
        for number, block in enumerate(network.transformer_blocks):
            methods = [row[number] for row in table]
            block.attn1.set_processor(PlainSharing(methods, clock, conditional=0 if layout == "dit" else 1))
    if delta is not None:
        network.transformer_blocks = nn.ModuleList([PlainDelta(list(network.transformer_blocks), clock, *delta)])
    options: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0 if guided else 1.0,
        "generator": generators(1, 1),
    }
    if layout == "dit":
        return by_pipeline(copied, "ddim", class_labels=[5], **options).latents
    texts: dict[str, Any] = {"prompt": "a red circle", "negative_prompt": "dull"}
    binning: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}
    return by_pipeline(copied, "ddim", **texts, **binning, **options).latents


def ours(backbone: Backbone, layout: str, guided: bool, *accelerators: Accelerator) -> Tensor:
    texts = {"prompt": "a red circle", "negative_prompt": "dull"}
    content: dict[str, Any] = {"class_label": 5} if layout == "dit" else texts
    scale = 3.0 if guided else 1.0
    request = Request(
        **content, seed=1, num_inference_steps=STEPS, guidance_scale=scale, scheduler="ddim", acceleration=accelerators
    )
    return generate(backbone, [request])[0].latents


def attention_plan(backbone: Backbone, table: Table, guided: bool) -> DiTFastAttn:
    plan = Plan(
        model=backbone.spec.name,
        config_hash=backbone.spec.config_hash,
        scheduler="ddim",
        num_inference_steps=STEPS,
        tokens=TOKENS,
        guidance=guided,
        window=WINDOW,
        threshold=0.1,
        table=tuple(tuple(row) for row in table),
    )
    return DiTFastAttn(plan=plan)


FULL: list[Method] = ["full"] * BLOCKS


def uniform(method: Method) -> Table:
    return [FULL] + [[method] * BLOCKS] * (STEPS - 1)


def shuffled(seed: int, guided: bool) -> Table:
    choices = [method for method in METHODS if guided or "asc" not in method]
    pick = random.Random(seed)
    return [FULL] + [[pick.choice(choices) for _ in range(BLOCKS)] for _ in range(STEPS - 1)]


def close(a: Tensor, b: Tensor) -> bool:
    assert a.dtype == b.dtype == torch.float64
    return bool((a - b).norm() <= 1e-10 * b.norm())


TABLES = [
    *(pytest.param(True, uniform(method), id=f"guided-{method}") for method in METHODS),
    *(pytest.param(False, uniform(method), id=f"unguided-{method}") for method in ("full", "ast", "wa-rs")),
    *(
        pytest.param(guided, shuffled(s, guided), id=f"shuffled-{s}-{guided}")
        for s in range(4)
        for guided in (True, False)
    ),
]


@pytest.mark.parametrize(("guided", "table"), TABLES)
@pytest.mark.parametrize("layout", ["dit", "pixart-alpha", "pixart-sigma"])
def test_ditfastattn(layout: str, guided: bool, table: Table, backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    backbone = backbone_of(layout, torch.float64)
    result = ours(backbone, layout, guided, attention_plan(backbone, table, guided))
    assert close(result, reference(pipeline_of(layout, torch.float64), layout, guided, table))


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(
    ("interval", "blocks", "boundary"),
    [(1, 2, 3), (2, 4, 3), (2, 3, 4), (3, 5, 2), (5, 1, 6), (5, 5, 0), (6, 3, 3), (2, 2, 100)],
)
@pytest.mark.parametrize("layout", ["dit", "pixart-alpha"])
def test_delta_dit(
    layout: str,
    interval: int,
    blocks: int,
    boundary: int,
    guided: bool,
    backbone_of: Backbones,
    pipeline_of: Pipelines,
) -> None:
    accelerator = DeltaDiT(interval=interval, blocks=blocks, boundary=boundary)
    result = ours(backbone_of(layout, torch.float64), layout, guided, accelerator)
    pipeline = pipeline_of(layout, torch.float64)
    assert close(result, reference(pipeline, layout, guided, None, (interval, blocks, boundary)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("layout", ["dit", "pixart-sigma"])
def test_both_together(layout: str, seed: int, backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    backbone, table = backbone_of(layout, torch.float64), shuffled(seed, guided=True)
    delta = (2 + seed % 2, 2 + seed, 3)
    accelerators = (
        attention_plan(backbone, table, guided=True),
        DeltaDiT(interval=delta[0], blocks=delta[1], boundary=delta[2]),
    )
    result = ours(backbone, layout, True, *accelerators)
    assert close(result, reference(pipeline_of(layout, torch.float64), layout, True, table, delta))


def test_each_method_changes_the_picture(backbone_of: Backbones) -> None:
    """So that equality with the reference means something."""
    backbone = backbone_of("dit", torch.float64)
    pictures = [ours(backbone, "dit", True, attention_plan(backbone, uniform(m), guided=True)) for m in METHODS]
    assert all(not torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


@pytest.mark.parametrize(
    ("tokens", "window"), [(64, 0), (64, 5), (64, 62), (64, 63), (64, 200), (100, 33), (97, 40), (256, 32), (1024, 128)]
)
def test_window_kernel(tokens: int, window: int) -> None:
    q, k, v = torch.randn(3, 2, 3, tokens, 16)
    assert (window_attention(q, k, v, window) - masked(q, k, v, window)).abs().max() <= 1e-5
