"""`python -m models.shapes.classifier`: a small convolutional reader of shapes, whose features measure fidelity.

Fréchet distance wants features that see what matters in the pictures at hand. These come from a network that was taught
to say what stands where; a pair is read in the order left to right or top to bottom, however its caption puts it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from models.fit.loop import Options, fit
from models.shapes import pictures
from models.shapes.shapes import COLOURS, RADII, SHAPES, Scene, Thing, render, sample_scenes

FILE = Path(__file__).parent.parent / "bundled" / "classifier" / "model.safetensors"
FEATURES = 64
ATTRIBUTES = (tuple(RADII), tuple(COLOURS), SHAPES)
ANSWERS = (len(COLOURS), 3, *(len(values) for _ in range(2) for values in ATTRIBUTES))
"""Choices a question: background, arrangement (single, across, down), then size, colour and shape of either thing."""
UNASKED = -100  # the second thing of a single


class Classifier(nn.Module):
    """Pictures [pictures, 3, 64, 64] in [-1, 1] to FEATURES numbers each, and to one answer a question."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 96)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 4 * widths[-1], FEATURES))
        self.head = nn.Linear(FEATURES, sum(ANSWERS))

    def features(self, images: Tensor) -> Tensor:
        """[pictures, FEATURES]."""
        out: Tensor = self.trunk(images)
        return out

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The logits of every question."""
        answers: tuple[Tensor, ...] = self.head(F.silu(self.features(images))).split(ANSWERS, dim=1)
        return answers


def load(file: Path = FILE) -> Classifier:
    """The trained classifier, in float32 on the CPU."""
    classifier = Classifier()
    classifier.load_state_dict(load_file(file))
    return classifier.eval().requires_grad_(False)


@torch.inference_mode()
def features(classifier: Classifier, images: Sequence[Image.Image]) -> Tensor:
    """Features [pictures, FEATURES] of RGB pictures of 64x64 pixels."""
    parts = [images[start : start + 128] for start in range(0, len(images), 128)]
    return torch.cat([classifier.features(pictures.to_tensor(part)) for part in parts])


def targets(scene: Scene) -> list[int]:
    """The right answer to every question."""
    things, arrangement = scene.things, 0
    if scene.relation is not None:
        arrangement = 1 if scene.relation in ("to the left of", "to the right of") else 2
        if scene.relation in ("to the right of", "below"):
            things = things[::-1]
    answers = [list(COLOURS).index(scene.background), arrangement]
    for thing in things:
        answers += _attributes(thing)
    return answers + [UNASKED] * (len(ANSWERS) - len(answers))


def _attributes(thing: Thing) -> list[int]:
    given = (thing.size, thing.colour, thing.shape)
    return [values.index(value) for values, value in zip(ATTRIBUTES, given, strict=True)]


class ClassifierTask:
    """Cross-entropy of every question over freshly rendered scenes, with a little noise on the pixels."""

    name = "classifier"

    def __init__(self, batch: int = 64, lr: float = 2e-3) -> None:
        self.module = Classifier()
        self._batch, self._lr = batch, lr

    def optimizers(self) -> Sequence[Optimizer]:
        return [torch.optim.AdamW(self.module.parameters(), lr=self._lr, weight_decay=0.01)]

    def loss(self, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**31, (1,), generator=generator))
        images, wanted = _scenes(seed, self._batch, held_out=False)
        noisy = images + 0.05 * torch.randn(images.shape, generator=generator)
        answers = self.module(noisy)
        return torch.stack([F.cross_entropy(one, wanted[:, i]) for i, one in enumerate(answers)]).sum()

    @torch.no_grad()
    def preview(self, folder: Path, step: int) -> str:
        images, wanted = _scenes(5, 512, held_out=True)
        right = torch.stack([one.argmax(1) for one in self.module(images)], dim=1) == wanted
        return (
            f"every answer right for {(right | (wanted == UNASKED)).all(dim=1).float().mean():.1%} of held-out scenes"
        )


def _scenes(seed: int, count: int, *, held_out: bool) -> tuple[Tensor, Tensor]:
    rng = random.Random(seed)
    scenes = list(islice(sample_scenes(seed, held_out=held_out, pair_share=0.75), count))
    return pictures.to_tensor(render(scene, rng) for scene in scenes), torch.tensor([targets(s) for s in scenes])


def main() -> None:
    """Train and write FILE in half precision."""
    parser = argparse.ArgumentParser(prog="python -m models.shapes.classifier", description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--folder", type=Path, default=Path("runs/classifier"), help="checkpoints")
    parser.add_argument("--output", type=Path, default=FILE)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    task = ClassifierTask()
    fit(task, Options(folder=arguments.folder, steps=arguments.steps, ema_decay=0.99))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half() for name, value in task.module.state_dict().items()}, arguments.output)


if __name__ == "__main__":
    main()
