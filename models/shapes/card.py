"""The model card: what a bundled model knows, how it was trained, and the figures that were measured."""

from typing import Any

from models.shapes.shapes import COLOURS, RADII, RELATIONS, SHAPES, SIDE

_TEXT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# {name}

{description}. A model to try accelerators on, small enough to draw on a CPU in a second or two; it knows nothing else.

Its captions are "a *size* *colour* *shape* on a *colour* background" and "a *size* *colour* *shape* *relation* a *size*
*colour* *shape* on a *colour* background", in this word order.

| word | values |
|---|---|
| size | {sizes} |
| colour | {colours} |
| shape | {shapes} |
| relation | {relations} |

## Parts
{parts}

## Training
Everything is procedural: `python -m models.shapes.train {name}` renders the scenes, then trains the autoencoder, the
text encoder (to say what stands where, with heads that are thrown away) and the denoiser on cached latents. The
denoiser predicts velocity on Stable Diffusion's betas rescaled to zero terminal SNR, with trailing timesteps; a tenth
of the captions is empty, and {false:.0%} make one false claim, as captions found in the world do.
Muon on the matrices, AdamW on the rest, moving average of the weights.
This one: {steps} steps of {batch} captions from {scenes} scenes, {minutes:.0f} minutes on {hardware}.{before}
A tenth of all combinations, chosen by a hash of the caption, was never shown.

## Measured
On {captions} captions of held-out combinations (half with one thing, half with two), 25 DDIM steps, one picture each,
by the analytic checker in `models/shapes/checker.py`. *All right* is the alignment.

| guidance scale | background | colours | shapes | sizes | relation | all right |
|---|---|---|---|---|---|---|
{table}
"""


def text(name: str, description: str, parts: dict[str, int], figures: dict[str, Any]) -> str:
    """The card as Markdown. `parts` gives each network's parameter count; `figures` is what `validate` wrote."""
    rows = [_row(scale, rates) for scale, rates in figures["rates"].items()]
    facts = {key: value for key, value in figures.items() if key != "rates"}
    earlier = "\nUntil step {steps} it saw {scenes} scenes, {false:.0%} of their captions false."
    facts["before"] = "".join(earlier.format(**part) for part in figures.get("before", []))
    return _TEXT.format(
        name=name,
        description=description,
        sizes=", ".join(f"{size} ({2 * radius:g} of {SIDE} pixels)" for size, radius in RADII.items()),
        colours=", ".join(COLOURS),
        shapes=", ".join(SHAPES),
        relations=", ".join(RELATIONS),
        parts="\n".join(f"- {part}: {count / 1e6:.2f} M parameters" for part, count in parts.items()),
        table="\n".join(rows),
        **facts,
    )


def _row(scale: str, rates: dict[str, float]) -> str:
    claims = ("background", "colours", "shapes", "sizes", "relation", "all")
    label = "1 (no guidance)" if float(scale) == 1.0 else f"{float(scale):g}"
    return f"| {label} | {' | '.join(f'{rates[claim]:.1%}' for claim in claims)} |"
