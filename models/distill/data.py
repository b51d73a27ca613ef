"""Where a student learns: along the teacher's own guided trajectories (prompts only), or on noised pictures.

Training on trajectories fixes the mismatch between training and inference (adapter guidance distillation,
arXiv:2503.07274), and costs nothing extra: the teacher's guided prediction is the target and takes the step as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from models.backbone import Backbone
from models.distill.student import join
from models.errors import RequestError
from models.request import Request
from models.resolve import resize, resolve
from models.reuse.rows import Conditioning
from models.solvers.names import noise_schedule

Prompts = Callable[[int], str]
"""The n-th prompt of an endless, repeatable line."""
Pictures = Sequence[tuple[Image.Image, str]]


class World(NamedTuple):
    """Where captions and captioned pictures of what a model draws can be made: of a seed, of a count and a seed."""

    prompts: Callable[[int], Prompts]
    pictures: Callable[[int, int], Pictures]


class Batch(NamedTuple):
    """Noisy latents x [rows, channels, h, w] at times t [rows] (device) with the conditioning of both rows."""

    x: Tensor
    t: Tensor
    conditional: Conditioning
    unconditional: Conditioning


class Source(nn.Module, ABC):
    """Batches to distil on. Its buffers are what a resumed run must find again."""

    def __init__(self, backbone: Backbone, num_inference_steps: int) -> None:
        super().__init__()
        self._backbone, self._steps = backbone, num_inference_steps
        schedule = noise_schedule("ddim", backbone.scheduler_config, num_inference_steps)
        self.scheduler, self.timesteps = schedule.scheduler, [int(t) for t in schedule.timesteps]

    @abstractmethod
    def batch(self, generator: torch.Generator) -> Batch:
        """The next batch; `generator` (CPU) is the only source of chance."""

    def advance(self, guided: Tensor, student: Tensor) -> None:
        """Take note of the teacher's guided prediction, and of the student's, for the last batch."""

    def _batch(self, x: Tensor, times: Sequence[int], prompts: Sequence[str]) -> Batch:
        backbone = self._backbone
        runs = [
            resolve(backbone.spec, backbone.scheduler_config, Request(prompt=p, guidance_scale=2.0)) for p in prompts
        ]
        with torch.autocast(backbone.device.type, enabled=False):  # kept for later batches, so always encoded alike
            both = [backbone.conditioning(run) for run in runs]
        conditional, unconditional = (join([one[role] for one in both]) for role in ("conditional", "unconditional"))
        return Batch(x, torch.tensor(times, device=x.device), conditional, unconditional)


class Trajectories(Source):
    """`rows` DDIM trajectories in flight, spread over the steps; a finished one makes room for a new prompt.

    They follow the teacher's guided predictions, or with `own` the student's: then it learns where it goes itself, and
    what to mend there (on-policy distillation, arXiv:2306.13649).
    """

    latents: Tensor
    step: Tensor
    prompt: Tensor

    def __init__(
        self,
        backbone: Backbone,
        num_inference_steps: int,
        prompts: Prompts,
        rows: int,
        seed: int = 0,
        *,
        own: bool = False,
    ) -> None:
        super().__init__(backbone, num_inference_steps)
        self._prompts, self._seed, self._own = prompts, seed, own
        spec = backbone.spec
        size = (spec.native_height // spec.latent_scale, spec.native_width // spec.latent_scale)
        self.register_buffer("latents", torch.zeros(rows, spec.latent_channels, *size, device=backbone.device))
        self.register_buffer("step", torch.zeros(rows, dtype=torch.long))
        self.register_buffer("prompt", torch.arange(rows))
        for row in range(rows):
            self._start(row, row)

    def spread(self, teacher: Callable[[Batch], Tensor]) -> None:
        """Run every trajectory ahead so that the rows stand at evenly spread steps."""
        rows, steps = len(self.step), len(self.timesteps)
        targets = [row * steps // rows for row in range(rows)]
        while any(behind := [int(s) < target for s, target in zip(self.step, targets, strict=True)]):
            self._advance(teacher(self._now()), behind)

    def batch(self, generator: torch.Generator) -> Batch:
        """All rows where they stand."""
        return self._now()

    def advance(self, guided: Tensor, student: Tensor) -> None:
        """One DDIM step of every row along the prediction [rows, channels, h, w] that it follows."""
        self._advance(student if self._own else guided, [True] * len(self.step))

    def _now(self) -> Batch:
        times = [self.timesteps[step] for step in self.step.tolist()]
        return self._batch(self.latents.clone(), times, [self._prompts(n) for n in self.prompt.tolist()])

    @torch.no_grad()
    def _advance(self, prediction: Tensor, moving: Sequence[bool]) -> None:
        for row, (moves, step) in enumerate(zip(moving, self.step.tolist(), strict=True)):
            if not moves:
                continue
            here = slice(row, row + 1)
            self.latents[here] = self.scheduler.step(
                prediction[here].float(), self.timesteps[step], self.latents[here], return_dict=False
            )[0]
            self.step[row] += 1
            if step + 1 == len(self.timesteps):
                self._start(row, int(self.prompt.max()) + 1)

    def _start(self, row: int, prompt: int) -> None:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + prompt)
        self.latents[row] = torch.randn(self.latents.shape[1:], generator=generator) * self.scheduler.init_noise_sigma
        self.step[row], self.prompt[row] = 0, prompt


class Noised(Source):
    """Captioned pictures, encoded once, with fresh noise at a random time of the training schedule."""

    def __init__(self, backbone: Backbone, num_inference_steps: int, pictures: Pictures, rows: int) -> None:
        super().__init__(backbone, num_inference_steps)
        spec, generator = backbone.spec, torch.Generator().manual_seed(0)
        size = (spec.native_width, spec.native_height)
        drawn = (backbone.draw(backbone.posterior(resize(picture, *size)), generator) for picture, _ in pictures)
        self._latents = torch.cat([latents.cpu() for latents in drawn]).clone()
        self._captions = [caption for _, caption in pictures]
        self._rows = rows

    def batch(self, generator: torch.Generator) -> Batch:
        """Random pictures, one time from each of `rows` equal slices of the schedule."""
        chosen = torch.randint(len(self._latents), (self._rows,), generator=generator)
        noise = torch.randn(self._rows, *self._latents.shape[1:], generator=generator)
        slices = (torch.arange(self._rows) + torch.rand(self._rows, generator=generator)) / self._rows
        times = (slices * self._backbone.spec.num_train_timesteps).long()
        x = self.scheduler.add_noise(self._latents[chosen], noise, times).to(self._backbone.device)
        return self._batch(x, times.tolist(), [self._captions[n] for n in chosen.tolist()])


def read_pictures(folder: Path) -> Pictures:
    """Pictures of a directory with their captions: `name.png` (jpg, webp) beside `name.txt`."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".png", ".jpg", ".jpeg", ".webp")]
    pairs = [(path, path.with_suffix(".txt")) for path in files]
    if not pairs or not all(text.is_file() for _, text in pairs):
        raise RequestError("data", f"{folder} must hold pictures, each with its caption beside it as a .txt file")
    return [(Image.open(path).convert("RGB"), text.read_text().strip()) for path, text in pairs]
