"""Our caches beside their authors' and other people's, on the same work. `slipstream bench peers`

DeepCache against the DeepCache package (same N and branch, target: at most its time, 5 % of its feature memory);
attention sharing against diffusers' PyramidAttentionBroadcast; block caching against cache-dit. All give latents, and
every prompt is new to every text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from models.accelerators import Accelerator, DeepCache, DeltaDiT
from tests.bench import peers, zoo
from tests.bench.harness import Contender, Race, Spread, options, quiet, race
from tests.bench.report import Report, bars
from tests.bench.runs import attention, denoise, fresh_prompt, request
from tests.bench.zoo import Model

INTERVAL, BRANCH = 3, 0


def theirs(model: Model, pipeline: Any, steps: int) -> object:
    """Latents by a diffusers pipeline."""
    scale = model.backbone.spec.default_guidance_scale
    return peers.draw(pipeline, fresh_prompt(model), steps, scale, output="latent")


def ours(model: Model, steps: int, acceleration: Sequence[Accelerator] = ()) -> int:
    """Latents by us; the feature bytes held at the most."""
    return denoise(model, [request(model, steps, acceleration, prompt=fresh_prompt(model))])


def deepcache(model: Model, steps: int, rounds: int) -> tuple[Race, dict[str, int]]:
    """Ours and the package's; and the feature bytes of each."""
    plain, cached = model.pipeline(), model.pipeline()
    accelerated = [DeepCache(interval=INTERVAL, branch=BRANCH)]
    held: dict[str, int] = {}

    def mine() -> None:
        held["ours, deepcache"] = ours(model, steps, accelerated)

    with peers.deepcache(cached, INTERVAL, BRANCH) as helper:

        def package() -> None:
            theirs(model, cached, steps)
            held["DeepCache package"] = peers.deepcache_bytes(helper)

        contenders: dict[str, Contender] = {
            "diffusers": lambda: theirs(model, plain, steps),
            "ours": lambda: ours(model, steps),
            "DeepCache package": package,
            "ours, deepcache": mine,
        }
        return race(contenders, rounds, warmup=1), held


def transformer_caches(model: Model, steps: int, rounds: int) -> Race:
    """PyramidAttentionBroadcast and cache-dit, each beside the accelerator of ours that leaves out the same work."""
    depth = model.backbone.spec.depth
    front = depth // 4
    plain, broadcast, blocks = (model.pipeline() for _ in range(3))

    def pab() -> None:
        peers.reset_broadcast(broadcast)
        theirs(model, broadcast, steps)

    with ExitStack() as stack:
        stack.enter_context(peers.pyramid_broadcast(broadcast, 2))
        contenders: dict[str, Contender] = {
            "diffusers": lambda: theirs(model, plain, steps),
            "ours": lambda: ours(model, steps),
            "PyramidAttentionBroadcast": pab,
            "ours, ditfastattn ast": partial(ours, model, steps, [attention(model, steps, "ast")]),
        }
        if peers.has_cache_dit():
            stack.enter_context(peers.cache_dit(blocks, front, 1))
            contenders["cache-dit"] = lambda: theirs(model, blocks, steps)
        rear = DeltaDiT(interval=2, blocks=depth - front, boundary=1000)
        contenders[f"ours, delta_dit of {depth - front} blocks"] = partial(ours, model, steps, [rear])
        return race(contenders, rounds, warmup=1)


def table(model: Model, timed: Race, steps: int, held: dict[str, int]) -> list[dict[str, object]]:
    """One line a contender."""
    return [
        {
            "model": model.name,
            "run": name,
            "ms a step": timed.time(name).times(1000 / steps),
            "over diffusers": timed.ratio(name, "diffusers"),
            "feature KiB": held[name] / 1024 if name in held else None,
        }
        for name in timed.seconds
    ]


def main() -> None:
    """Measure every model against the peers that support it."""
    given = options(__doc__, models=[*zoo.SMALL, *zoo.LARGE], steps=20, steps_large=6)
    quiet()
    report = Report("peers", "The same work by others, over plain diffusers", given)
    found: dict[str, dict[str, Spread]] = {}
    for name in zoo.names(given):
        model, small = zoo.model(name), name in zoo.SMALL
        steps = 4 if given.quick else given.steps if small else given.steps_large
        rounds = given.rounds or (1 if given.quick else 7 if small else 3)
        held: dict[str, int] = {}
        if model.family == "unet":
            timed, held = deepcache(model, steps, rounds)
            ratio = timed.ratio("ours, deepcache", "DeepCache package")
            share = held["ours, deepcache"] / held["DeepCache package"]
            report.remark(f"{name}: our DeepCache takes {ratio} of the package's time, {share:.1%} of its memory.")
        else:
            timed = transformer_caches(model, steps, rounds)
        report.table(f"{name}, {steps} steps", table(model, timed, steps, held))
        found[name] = {run: timed.ratio(run, "diffusers") for run in timed.seconds}

    def draw(figure: Figure) -> None:
        for axes, (name, values) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            bars(axes, list(values), list(values.values()))
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("time over diffusers")

    report.save(draw, (5 * len(found), 2.8))


if __name__ == "__main__":
    main()
