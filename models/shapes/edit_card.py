"""The model card of shapes-edit: what it can be told, how it was trained, and the figures that were measured."""

from typing import Any

from models.shapes.edits import BACKGROUND_WORDS, DIRECTIONS, STEP
from models.shapes.shapes import COLOURS, SHAPES

_TEXT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-image
---
# {name}

{description}: an [InstructPix2Pix](https://arxiv.org/abs/2211.09800) to try accelerators on, small enough for a CPU.

It knows pictures as [shapes-sd](../shapes-sd/README.md) draws them, and is told

| instruction | values |
|---|---|
| make the *shape* *colour* | {shapes}; {colours} |
| {backgrounds} | the same colours |
| move the *shape* *direction* | {directions}; by {step:g} of 64 pixels |
| remove the *shape* | |

Where two things have one shape it cannot know which is meant.

## Parts
{parts}

## Training
`python -m models.shapes.train {name}` starts from shapes-sd. The first convolution of its U-Net gets four more input
channels, of weight zero, for the latents of the picture; the text encoder gets the words that captions do not have
and learns along with the U-Net. Scenes, instructions and edited scenes are drawn by the renderer. 5% of the
instructions are empty, 5% of the pictures are missing, and 5% lack both. Half of the timesteps are in the noisiest
quarter, where it is settled what an edit comes to. Muon on the matrices, AdamW on the rest, moving average of the
weights.
This one: {steps} steps of {batch} edits, of {scenes} scenes with three edits each, {minutes:.0f} minutes on
{hardware}.{notes}
Scenes whose combination is in the tenth that shapes-sd was never shown are held out, and so are edits that lead to one.

## Measured
On {edits} edits of held-out scenes, 25 DDIM steps, one picture each, guidance by the picture {image_scale:g}, by
the analytic judge in `models/shapes/edits.py`: *done* is what was asked for, *rest* that all else is as it was
(colour, shape, size, place to 3 pixels, background), *both* an edit that succeeded.

| guidance scale | done | rest | both | {operations} |
|---|---|---|---|{rules}|
{table}
"""
_OPERATIONS = ("colour", "background", "move", "remove")


def text(name: str, description: str, parts: dict[str, int], figures: dict[str, Any]) -> str:
    """The card as Markdown. `parts` gives each network's parameter count; `figures` is what `validate` wrote."""
    return _TEXT.format(
        name=name,
        description=description,
        shapes=", ".join(SHAPES),
        colours=", ".join(COLOURS),
        backgrounds=", ".join(words.format("*colour*") for words in BACKGROUND_WORDS),
        directions=", ".join(DIRECTIONS),
        step=STEP,
        parts="\n".join(f"- {part}: {count / 1e6:.2f} M parameters" for part, count in parts.items()),
        operations=" | ".join(_OPERATIONS),
        rules="|".join("---" for _ in _OPERATIONS),
        table="\n".join(_row(scale, rates) for scale, rates in figures["rates"].items()),
        **{"notes": ""} | {key: value for key, value in figures.items() if key != "rates"},
    )


def _row(scale: str, rates: dict[str, float]) -> str:
    label = "1 (no guidance)" if float(scale) == 1.0 else f"{float(scale):g}"
    return f"| {label} | {' | '.join(f'{rates[name]:.1%}' for name in ('done', 'rest', 'all', *_OPERATIONS))} |"
