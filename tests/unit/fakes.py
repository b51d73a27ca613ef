"""A model without a network, and a worker driven by hand: what the engine does, in milliseconds.

Everything here that knows how a forward is made is in `FakeBackbone`. Each of its pictures is of one grey: its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from app.engine.job import Event, Failed, Finished, Job
from app.engine.pace import Pace
from app.engine.worker import Worker
from app.errors import ServiceError
from app.metrics import Metrics, acceleration_label
from app.settings import Settings
from models import Backbone, Request
from models.adapters.lora import Lora
from models.adapters.registry import Adapters
from models.families import Family, Parts
from models.families.text import TextFamily
from models.guidance import ClassifierFree
from models.networks.base import Network
from models.resolve import resolve
from models.reuse.plans import StepRows
from models.reuse.rows import Conditioning, Row
from models.reuse.store import FeatureStore
from models.spec import ModelSpec
from tests.unit.specs import unet_spec

CONFIG: Mapping[str, Any] = {"prediction_type": "sample", "clip_sample": False}
"""A DDIM whose model predicts the clean picture: the last step's latents are the prediction."""
FEATURE_BYTES = 8 * 2 * 2 * 4
"""What one row remembers of one level: eight channels of two by two numbers."""


def tiny_spec(**changes: Any) -> ModelSpec:
    """A U-Net whose pictures are 16 pixels by 16."""
    return unet_spec(**{"native_width": 16, "native_height": 16, "latent_channels": 1, "adapters": {}, **changes})


class FakeText(TextFamily):
    """Stable Diffusion with an encoder of one number a prompt, which notes the prompts of each of its batches.

    `before(prompts)` is called ahead of each, and may raise or wait.
    """

    name = "fake"
    guidance = ClassifierFree()

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.before: Callable[[Sequence[str]], object] = lambda prompts: None

    def encode_texts(self, parts: Parts, texts: list[str]) -> Conditioning:
        """One number a prompt."""
        self.batches.append(texts)
        self.before(texts)
        return {"encoder_hidden_states": torch.zeros(len(texts), 1, 1)}

    def network(self, module: Any) -> Network:
        """See `FakeNetwork`."""
        raise NotImplementedError

    def dummy(self, config: Mapping[str, Any], rows: int, text_tokens: int) -> Conditioning:
        """See `FakeCounter`."""
        raise NotImplementedError


class FakeNetwork:
    """No network: rows stay in the order in which they came."""

    module = nn.Module()


class FakeCounter:
    """Ten MACs a row, at any size."""

    def at(self, size: tuple[int, int], text_tokens: int) -> FakeCounter:
        """The same at every size."""
        return self

    def row(self, plan: object) -> int:
        """One row."""
        return 10

    def run(self, steps: Sequence[StepRows], lora: object) -> int:
        """One image."""
        return sum(10 * step.num_rows for step in steps)


def no_files(path: Path, name: str) -> Lora:
    """Reads no adapter."""
    raise NotImplementedError


class FakeBackbone:
    """A model whose every prediction is the seed of its image.

    `before(seeds)` is called ahead of every forward with the seeds of its images, and may raise or wait; `ticks` are
    the seeds of the forwards that went well, `rows` their numbers of rows. `before_decode` and `decoded` are the same
    for pictures.
    """

    def __init__(self, spec: ModelSpec | None = None, family: Family | None = None) -> None:
        self.spec = spec or tiny_spec()
        self.scheduler_config = CONFIG
        self.network = FakeNetwork()
        self.adapters = Adapters(no_files)
        self.device = torch.device("cpu")
        self.dtype = self.latent_dtype = torch.float32
        self.counter = FakeCounter()
        self.features = FeatureStore()
        self.stepping, self.batch_invariant = "exact", False
        self.text = FakeText()
        self.family = family or self.text
        config = {"cross_attention_dim": 1, "num_embeds_ada_norm": self.spec.num_classes}
        pipeline = SimpleNamespace(components={"text_encoder": nn.Module()}, text_encoder=nn.Module())
        self.prompt_cache_bytes = 0
        self.parts = Parts(pipeline, config, self.device, self.dtype, text_tokens=1)
        self.roles = self.family.guidance.roles
        self.before: Callable[[list[int]], object] = lambda seeds: None
        self.before_decode: Callable[[list[int]], object] = lambda seeds: None
        self.ticks: list[list[int]] = []
        self.rows: list[int] = []
        self.decoded: list[list[int]] = []

    def control_bytes(self) -> int:
        """There are no control networks."""
        return 0

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row]) -> Tensor:
        """Predict the seeds, and remember what the plans want remembered."""
        owners: list[Any] = [row.owner for row in rows]
        seeds = [owner.generator.initial_seed() for owner in owners]
        self.before(list(dict.fromkeys(seeds)))
        for row in rows:
            for feature in row.plan.keep:
                shape = self.spec.sites.shape(feature, *x.shape[2:])
                self.features.write([(row.memory, (feature, row.plan.step))], torch.zeros(1, *shape))
        self.ticks.append(list(dict.fromkeys(seeds)))
        self.rows.append(len(rows))
        return torch.tensor(seeds, dtype=x.dtype).view(-1, 1, 1, 1).expand_as(x)

    prepare = Backbone.prepare
    group = Backbone.group
    conditioning = Backbone.conditioning
    release = Backbone.release

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [images, height, width, 3] of one grey for each of the latents [images, channels, h, w]."""
        seeds = [round(float(one.mean())) for one in latents]
        self.before_decode(seeds)
        self.decoded.append(seeds)
        height, width = latents.shape[2] * self.spec.latent_scale, latents.shape[3] * self.spec.latent_scale
        return torch.stack([torch.full((height, width, 3), seed, dtype=torch.uint8) for seed in seeds])

    def weight_bytes(self) -> int:
        """No weights."""
        return 0

    encoder_bytes = weight_bytes

    def adapter_bytes(self) -> int:
        """No adapters."""
        return 0

    @property
    def real(self) -> Backbone:
        """Itself, where a type is asked for."""
        return cast(Backbone, self)


def grey(image: Tensor) -> int:
    """The seed that a picture's pixels show."""
    return int(image[0, 0, 0])


def greys(event: Event) -> list[int]:
    """The seeds that a finished job's pictures show."""
    assert isinstance(event, Finished), event
    return [grey(image) for image in event.images]


def error_of(event: Event) -> ServiceError:
    """What a failed job ended with."""
    assert isinstance(event, Failed), event
    return event.error


_numbers = count()


def make_job(
    backbone: FakeBackbone | None = None,
    seed: int = 0,
    images: int = 1,
    steps: int = 2,
    *,
    name: str = "",
    model: str = "unet",
    prompt: str = "a ring",
    post: Callable[[Event], None] = lambda event: None,
    progress: bool = False,
    previews: int = 0,
    share: str = "",
    **request: Any,
) -> Job:
    """A job of unguided images (one row a step) unless `guidance_scale` says else, drawn from `seed` on."""
    backbone = backbone or FakeBackbone()
    asked: dict[str, Any] = {"guidance_scale": 1.0, **request}
    run = resolve(
        backbone.spec,
        backbone.scheduler_config,
        Request(prompt=prompt, seed=seed, num_images=images, num_inference_steps=steps, **asked),
    )
    label = acceleration_label(run.accelerators)
    facts: dict[str, Any] = {"progress": progress, "previews": previews, "share": share}
    return Job(name or f"job-{next(_numbers)}", model, run, label, post, **facts)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """A metric's value; 0 where it has never been counted."""
    return float(metrics.registry.get_sample_value(f"slipstream_{name}", labels) or 0.0)


class Hand:
    """A worker driven by hand, and what became of its jobs: `started` and `ended` as it told them."""

    def __init__(
        self,
        backbones: Mapping[str, FakeBackbone] | None = None,
        max_rows: int | Mapping[str, int] = 8,
        **settings: Any,
    ) -> None:
        self.backbones = backbones or {"unet": FakeBackbone()}
        self.backbone = next(iter(self.backbones.values()))
        self.metrics = Metrics()
        self.pace = Pace()
        self.clock = Clock()
        self.started: list[Job] = []
        self.ended: dict[Job, Event] = {}
        self.posted: dict[int, list[Event]] = {}
        self.worker = Worker(
            {name: backbone.real for name, backbone in self.backbones.items()},
            dict.fromkeys(self.backbones, max_rows) if isinstance(max_rows, int) else dict(max_rows),
            Settings(**settings),
            self.metrics,
            self.pace,
            self.clock,
            self.started.append,
            self._end,
        )

    def _end(self, job: Job, event: Event) -> None:
        assert job not in self.ended, "a job ends once"
        self.ended[job] = event

    def add(self, seed: int, images: int = 1, steps: int = 2, **options: Any) -> Job:
        """A new job, added; its events are in `posted` under its seed."""
        backbone = self.backbones[options.get("model", "unet")]
        post = self.posted.setdefault(seed, []).append
        job = make_job(backbone, seed, images, steps, post=post, **options)
        self.worker.add(job)
        return job

    def work(self, times: int | None = None) -> None:
        """So many pieces of work, or all there are."""
        for done in count():
            if done == times or (times is None and not self.worker.busy):
                return
            assert done < 1000, "it never ends"
            self.worker.work()

    def value(self, name: str, **labels: str) -> float:
        """A metric's value."""
        return sample(self.metrics, name, **labels)
