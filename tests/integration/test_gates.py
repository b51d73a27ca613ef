"""Gates at work: what they decide is what a plain loop decides, alone or mixed, and costs what it did."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models import Backbone, Request, advance, generate
from models.accelerators import (
    AdaptiveDeepCache,
    CfgStudent,
    DeepCache,
    DeltaDiT,
    FirstBlockCache,
    Forecast,
    SelectiveGuidance,
    TeaCache,
)
from models.accelerators.base import Accelerator
from models.accelerators.gated import GatedCache
from models.denoise import predict
from models.generate import finish, start
from models.networks.sites import blocks, level
from models.resolve import resolve
from models.reuse.gates import Gate
from models.reuse.sites import Site
from models.trajectory import Trajectory, decisions, effective_steps
from tests.gated import ALWAYS, NEVER, AskGate, Skip
from tests.integration.test_mixed import Failing, begin, distance, run
from tests.plain import denoise
from tests.reference import by_loop, generators, text_conditioning

Backbones = Callable[..., Backbone]
STEPS = 8
REST, MIDDLE, FRONT = blocks(1, 6), blocks(2, 5), blocks(0, 4)


def gate(site: Site, threshold: float, order: int = 0, **rule: Any) -> AskGate:
    """The first block's residual where the site allows it, unless told otherwise."""
    probe = {} if site.kind == "blocks" and site.start else {"probe": "input"}
    return AskGate(site=site, rule=Gate(**{"threshold": threshold, **probe, **rule}), order=order)


def request(backbone: Backbone, *acceleration: Accelerator, **options: Any) -> Request:
    content = {"class_label": 3} if backbone.spec.layout == "dit" else {"prompt": "a red ring"}
    asked = {"guidance_scale": 3.0, "num_inference_steps": STEPS, "scheduler": "ddim", "seed": 1}
    return Request(**{**content, **asked, "acceleration": acceleration, **options})


def skipped(trajectory: Trajectory) -> list[int]:
    """The steps whose site was reused. Both rows of a pair do the same."""
    found = []
    for i, step in enumerate(effective_steps(trajectory)):
        done = {any(site.kind != "output" for site in row.reads) for row in step}
        assert len(done) == 1
        found += [i] if done == {True} else []
    return found


def denoised(backbone: Backbone, wanted: Request) -> Trajectory:
    trajectory = begin(backbone, wanted)
    while not trajectory.done:
        advance(backbone, [trajectory])
    return trajectory


SITES = [("sd", level(0)), ("sd", level(5)), ("sd", level(8)), ("dit", REST), ("pixart-sigma", FRONT)]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(("layout", "site"), SITES)
def test_a_gate_that_never_skips_changes_nothing(
    layout: str, site: Site, guidance_scale: float, backbone_of: Backbones
) -> None:
    backbone = backbone_of(layout)
    options = {"guidance_scale": guidance_scale, "num_images": 2, "num_inference_steps": 4}
    [plain] = generate(backbone, [request(backbone, **options)])
    [gated] = generate(backbone, [request(backbone, gate(site, NEVER, 2), **options)])
    assert torch.equal(gated.latents, plain.latents)
    assert gated.usage == plain.usage


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("layout", "site"), SITES)
def test_a_gate_that_always_skips_is_a_static_schedule(
    layout: str, site: Site, order: int, backbone_of: Backbones
) -> None:
    """Two steps warm up, then one in three is computed, whatever the probe says."""
    backbone = backbone_of(layout)
    static = Skip(site=site, order=order, skipped=frozenset({2, 3, 5, 6}))
    [expected] = generate(backbone, [request(backbone, static)])
    asking = gate(site, ALWAYS, order, warmup=2, max_skips=2)
    gated = denoised(backbone, request(backbone, asking))
    assert skipped(gated) == [2, 3, 5, 6]
    assert decisions(gated) == {"skipped": 4, "computed": 2}
    assert torch.equal(gated.latents, expected.latents)


@pytest.mark.parametrize("layout", ["pixart-alpha", "pixart-sigma"])
@pytest.mark.parametrize("guided", [True, False])
def test_equals_diffusers_first_block_cache(
    layout: str, guided: bool, backbone_of: Backbones, pipeline_of: Callable[..., Any]
) -> None:
    """Their hook over a batch of one pair; both where it skips and where it computes."""
    mixes = 0
    for threshold in (0.05, 0.1, 0.2):
        pipeline = copy.deepcopy(pipeline_of(layout, torch.float64))
        apply_first_block_cache(pipeline.transformer, FirstBlockCacheConfig(threshold=threshold))
        ran: list[int] = []
        pipeline.transformer.transformer_blocks[3].attn1.register_forward_hook(lambda *_, ran=ran: ran.append(0))
        rows = text_conditioning(pipeline, "a red ring", "", guided)
        with CacheMixin.cache_context(pipeline.transformer, "pair"):
            expected = by_loop(pipeline, "ddim", rows, steps=STEPS, scale=3.0, seeds=generators(1, 1))
        wanted = gate(REST, threshold, pair="mean")
        backbone = backbone_of(layout, torch.float64)
        ours = denoised(backbone, request(backbone, wanted, guidance_scale=3.0 if guided else 1.0))
        assert STEPS - len(skipped(ours)) == len(ran)
        assert torch.equal(ours.latents, expected.latents)
        mixes += 0 < len(skipped(ours)) < STEPS - 1
    assert mixes >= 2


class ByHand:
    """TeaCache's rule on what enters an input block of diffusers' U-Net, decided a step at a time."""

    def __init__(self, unet: Any, number: int, threshold: float, coefficients: Sequence[float]) -> None:
        inputs = [r for block in unet.down_blocks for r in (*block.resnets, *(block.downsamplers or ()))]
        inputs[number].register_forward_pre_hook(self._see)
        self._threshold, self._coefficients = threshold, coefficients
        self._before: Tensor | None = None
        self._sum = 0.0
        self.skipped: list[int] = []
        self.steps = 0
        self._skip = False

    def _see(self, _: Any, inputs: tuple[Any, ...]) -> None:
        now, before = inputs[0].clone(), self._before
        self._before = now
        self._skip = False
        if before is not None:
            change = max(float((a - b).abs().mean() / b.abs().mean()) for a, b in zip(now, before, strict=True))
            self._sum += sum(c * change**i for i, c in enumerate(reversed(self._coefficients)))
            self._skip = self._sum < self._threshold
        if self._skip:
            self.skipped.append(self.steps)
        else:
            self._sum = 0.0
        self.steps += 1

    def __call__(self, step: int) -> Any:
        return "remembered" if self._skip else "computed"


@pytest.mark.parametrize("number", [1, 4, 7])
def test_equals_a_rule_followed_by_hand(number: int, backbone_of: Backbones, pipeline_of: Callable[..., Any]) -> None:
    """Changes from step to step, through a polynomial, summed; the larger of a pair's."""
    pipeline = copy.deepcopy(pipeline_of("sd"))
    coefficients = (3.0, -0.5, 1.0, 0.01)
    hand = ByHand(pipeline.unet, number, 0.3, coefficients)
    expected = denoise(
        pipeline, "ddim", steps=STEPS, prompt="a red ring", negative="", seed=1, level=number, inner=hand
    )
    asking = gate(level(number), 0.3, accumulate=True, coefficients=coefficients, refresh="always")
    backbone = backbone_of("sd")
    ours = denoised(backbone, request(backbone, asking))
    assert skipped(ours) == hand.skipped
    assert 1 < len(hand.skipped) < STEPS - 1
    assert torch.equal(ours.latents, expected)


def test_a_forecast_reads_what_was_computed(backbone_of: Backbones) -> None:
    """The same picture as that of a static schedule told the steps that the gate left out."""
    backbone = backbone_of("pixart-sigma")
    for order in (1, 2):
        ours = denoised(backbone, request(backbone, gate(REST, 0.08, order)))
        assert 1 < len(skipped(ours)) < STEPS - 2
        static = Skip(site=REST, order=order, skipped=frozenset(skipped(ours)))
        assert torch.equal(ours.latents, denoised(backbone, request(backbone, static)).latents)


CASES: dict[str, dict[str, list[Accelerator]]] = {
    "sd": {
        "plain": [],
        "shallow": [gate(level(1), 0.25)],
        "deep": [gate(level(6), 0.25, 1)],
        "summed": [gate(level(6), 0.35, 2, accumulate=True, refresh="always", pair="mean")],
        "deepcache": [DeepCache(interval=3, branch=3)],
        "outer": [DeepCache(interval=2, branch=2), gate(level(4), 0.3)],
        "student": [CfgStudent(), gate(level(1), 0.25)],
        "selective": [SelectiveGuidance(start=0.25, stop=0.75), gate(level(3), 0.25, 1)],
        "adaptive": [AdaptiveDeepCache(threshold=0.25, branch=1, order=1, max_skips=2)],
    },
    "pixart-sigma": {
        "plain": [],
        "rest": [gate(REST, 0.1)],
        "middle": [gate(MIDDLE, 0.4, 2, probe="input")],
        "front": [gate(FRONT, 0.2, 1, accumulate=True, refresh="always")],
        "delta": [DeltaDiT(interval=2, blocks=4, boundary=3)],
        "apart": [Skip(site=blocks(0, 2), skipped=frozenset({2, 5})), gate(blocks(3, 5), 0.1)],
        "student": [CfgStudent(), gate(REST, 0.1)],
        "selective": [SelectiveGuidance(start=0.25, stop=0.75), gate(REST, 0.1, 1, pair="mean")],
        "first": [FirstBlockCache(threshold=0.1, order=2, warmup=2)],
        "tea": [TeaCache(threshold=0.4, coefficients=(0.5, 1.0, 0.0), order=1)],
        "foretold": [Forecast(interval=3), TeaCache(threshold=0.5, coefficients=(1.0, 0.0), pair="max")],
    },
}
GATED = [(layout, name) for layout in CASES for name in CASES[layout] if name not in ("plain", "deepcache", "delta")]


def case(layout: str, name: str, backbone: Backbone) -> Request:
    index = list(CASES[layout]).index(name)
    scheduler = ("ddim", "euler", "dpmpp_2m")[index % 3]
    scale = None if name == "student" else 2.0 + index
    options = {"seed": index, "prompt": f"picture {index}", "scheduler": scheduler, "guidance_scale": scale}
    return request(backbone, *CASES[layout][name], **options, num_inference_steps=STEPS + index % 2)


@pytest.fixture(scope="module")
def alone(student_of: Backbones) -> Callable[[str, str], Trajectory]:
    """A case that had the backbone for itself, in float64."""
    done: dict[tuple[str, str], Trajectory] = {}

    def trajectory(layout: str, name: str) -> Trajectory:
        if (layout, name) not in done:
            backbone = student_of(layout, torch.float64)
            done[layout, name] = denoised(backbone, case(layout, name, backbone))
        return done[layout, name]

    return trajectory


@pytest.mark.parametrize("stagger", [0, 1, 3])
@pytest.mark.parametrize("layout", CASES)
def test_alone_equals_mixed(layout: str, stagger: int, student_of: Backbones, alone: Callable[..., Trajectory]) -> None:
    """Gates of other sites and rules, static schedules and plain rows in one batch."""
    backbone = student_of(layout, torch.float64)
    results = run(backbone, [case(layout, name, backbone) for name in CASES[layout]], stagger)
    for name, latents in zip(CASES[layout], results, strict=True):
        assert distance(latents, alone(layout, name).latents) <= 1e-10, name


@pytest.mark.parametrize(("layout", "name"), GATED)
def test_the_cases_skip_and_compute(layout: str, name: str, alone: Callable[..., Trajectory]) -> None:
    """So that the tests around this one see both, and no decision was near enough to its threshold to flip."""
    made = decisions(alone(layout, name))
    assert made["skipped"] >= 1
    assert made["computed"] >= 1
    assert alone(layout, name).memory_bytes() == 0


def test_a_pair_decides_together(backbone_of: Backbones) -> None:
    """Over thresholds so fine that some lie between what the one row and the other would have done."""
    backbone = backbone_of("pixart-sigma")
    seen = set()
    for i in range(30):
        trajectory = denoised(backbone, request(backbone, gate(REST, 0.02 * 1.1**i), num_inference_steps=5))
        seen.add(tuple(skipped(trajectory)))
    assert len(seen) >= 4


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(("layout", "site"), SITES[1:4:2])
def test_no_more_is_remembered_than_was_planned(layout: str, site: Site, order: int, backbone_of: Backbones) -> None:
    """To the byte where everything is computed, less where it is not, and nothing afterwards."""
    backbone = backbone_of(layout)
    peaks = {}
    for threshold, limit in ((NEVER, None), (ALWAYS, None), (ALWAYS, 1)):
        wanted = request(backbone, gate(site, threshold, order, max_skips=limit))
        planned = resolve(backbone.spec, backbone.scheduler_config, wanted).feature_bytes
        backbone.features.peak_bytes = 0
        denoised(backbone, wanted)
        peaks[threshold, limit] = backbone.features.peak_bytes / planned
        assert backbone.features.nbytes == backbone.features.reserved_bytes == 0
    assert peaks[NEVER, None] == 1.0
    assert all(0 < peak <= 1.0 for peak in peaks.values())
    assert (peaks[ALWAYS, None] < 1.0) == (order > 0)


def never(accelerator: Accelerator) -> Accelerator:
    """The same gate, under which no change lies."""
    if isinstance(accelerator, AskGate):
        rule = replace(accelerator.rule, threshold=NEVER, accumulate=False)
        return accelerator.model_copy(update={"rule": rule})
    if isinstance(accelerator, GatedCache):
        return accelerator.model_copy(update={"threshold": 1e-300})
    return accelerator


@pytest.mark.parametrize(("layout", "name"), GATED)
def test_every_case_keeps_to_its_plan(layout: str, name: str, student_of: Backbones) -> None:
    """With guidance that comes and goes, and with other features beside the gate's."""
    backbone = student_of(layout, torch.float64)
    backbone.features.peak_bytes = 0
    wanted = case(layout, name, backbone)
    denoised(backbone, wanted)
    assert 0 < backbone.features.peak_bytes <= resolve(backbone.spec, backbone.scheduler_config, wanted).feature_bytes
    computed = replace(wanted, acceleration=[never(a) for a in wanted.accelerators])
    backbone.features.peak_bytes = 0
    denoised(backbone, computed)
    assert backbone.features.peak_bytes == resolve(backbone.spec, backbone.scheduler_config, computed).feature_bytes


@pytest.mark.parametrize(("layout", "name"), [("sd", "summed"), ("pixart-sigma", "rest")])
def test_memory_comes_back_however_a_run_ends(layout: str, name: str, student_of: Backbones) -> None:
    backbone = student_of(layout, torch.float64)
    for failing in (False, True):
        trajectory = begin(backbone, case(layout, name, backbone))
        for _ in range(3):
            advance(backbone, [trajectory])
        if failing:
            with pytest.raises(RuntimeError, match="broken on purpose"):
                advance(replace(backbone, network=Failing(backbone.network, at=0)), [trajectory])
        assert backbone.features.nbytes == trajectory.memory_bytes() > 0
        del trajectory
        gc.collect()
        assert backbone.features.nbytes == 0


class Breaking:
    """Raises where a network is about to run one of its modules for the n-th time."""

    def __init__(self, module: Any) -> None:
        self._handle = module.register_forward_pre_hook(self._raise)

    def _raise(self, *_: Any) -> None:
        raise RuntimeError("broken on purpose")

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def last_module(backbone: Backbone) -> Any:
    """Something that every row runs, after all gates have decided."""
    module: Any = backbone.network.module
    return module.conv_out if hasattr(module, "conv_out") else module.proj_out


def inner_module(backbone: Backbone) -> Any:
    """Something inside most of the gated sites, which computed rows run after the gates have decided."""
    module: Any = backbone.network.module
    return module.mid_block.resnets[0] if hasattr(module, "mid_block") else module.transformer_blocks[3]


@pytest.mark.parametrize(("layout", "name"), GATED)
def test_a_failed_tick_can_be_tried_again(
    layout: str, name: str, student_of: Backbones, alone: Callable[..., Trajectory]
) -> None:
    """Whichever step fails, inside the site, behind it or after the forward: the gate stands where it stood."""
    backbone = student_of(layout, torch.float64)
    trajectory = begin(backbone, case(layout, name, backbone))
    planned = resolve(backbone.spec, backbone.scheduler_config, case(layout, name, backbone)).feature_bytes
    while not trajectory.done:
        step, latents, state = trajectory.step, trajectory.latents, trajectory.gate
        with Breaking(last_module(backbone)), pytest.raises(RuntimeError, match="broken on purpose"):
            advance(backbone, [trajectory])
        with pytest.raises(RuntimeError, match="broken on purpose"):
            advance(replace(backbone, network=Failing(backbone.network, at=0)), [trajectory])
        assert (trajectory.step, trajectory.gate) == (step, state)
        assert trajectory.latents is latents
        assert trajectory.memory_bytes() <= planned
        with Breaking(inner_module(backbone)):
            try:
                advance(backbone, [trajectory])
            except RuntimeError:
                assert (trajectory.step, trajectory.gate) == (step, state)
        if trajectory.step == step:
            advance(backbone, [trajectory])
    assert torch.equal(trajectory.latents, alone(layout, name).latents)
    assert effective_steps(trajectory) == effective_steps(alone(layout, name))
    assert trajectory.memory_bytes() == 0


aten = torch.ops.aten
WAITING = {aten.item, aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.allclose}


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what would wait for a device: numbers and tensors brought to the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in WAITING
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """The waits counted while it is entered, `tolist` and `cpu` among them."""
    counter = Waits()  # type: ignore[no-untyped-call]
    for name in ("tolist", "cpu", "numpy"):
        plain = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, plain: Any = plain) -> Any:
            counter.count += 1
            return plain(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    return counter


@pytest.mark.parametrize("layout", CASES)
def test_gates_meet_the_host_once_a_forward(layout: str, student_of: Backbones, waits: Waits) -> None:
    """However many there are and wherever they stand; never where no gate has a choice."""
    backbone = student_of(layout, torch.float64)
    trajectories = [begin(backbone, case(layout, name, backbone)) for name in CASES[layout]]
    met = []
    for _ in range(3):
        rows = [(row, t) for t in trajectories for row in t.rows()]
        open_gates = {row.turn for row, _ in rows if row.plan.gating and not row.plan.gating.forced}
        before = waits.count
        with waits:
            predict(backbone, rows)
        met.append((waits.count - before, min(len(open_gates), 1)))
        advance(backbone, trajectories)
    assert [count for count, _ in met] == [one for _, one in met]
    assert [one for _, one in met][:2] == [0, 1]


def test_rows_without_a_gate_meet_it_never(student_of: Backbones, waits: Waits) -> None:
    backbone = student_of("sd", torch.float64)
    trajectories = [begin(backbone, case("sd", name, backbone)) for name in ("plain", "deepcache")]
    for _ in range(3):
        with waits:
            predict(backbone, [(row, t) for t in trajectories for row in t.rows()])
        advance(backbone, trajectories)
    assert waits.count == 0


COUNTED = {"sd": ("plain", "deep", "outer"), "pixart-sigma": ("plain", "rest", "front", "selective")}


@pytest.mark.parametrize("layout", COUNTED)
def test_what_is_counted_is_what_ran(layout: str, student_of: Backbones) -> None:
    """MACs of a mixed batch on the CPU, and the sum of what its requests are told."""
    backbone = student_of(layout)
    wanted = [case(layout, name, backbone) for name in COUNTED[layout]]
    runs = [resolve(backbone.spec, backbone.scheduler_config, one) for one in wanted]
    started = [start(backbone, run) for run in runs]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        while active := [t for [t] in started if not t.done]:
            advance(backbone, active)
    told = [finish(backbone, *both).usage for both in zip(runs, started, strict=True)]
    assert sum(usage.macs for usage in told) == pytest.approx(counter.get_total_flops() // 2, rel=0.01)
    for name, usage, [trajectory] in zip(COUNTED[layout], told, started, strict=True):
        assert (usage.macs < 0.999 * usage.macs_unaccelerated) == (name != "plain")
        assert bool(trajectory.ran) == ((layout, name) in GATED)


def test_every_image_decides_for_itself(backbone_of: Backbones) -> None:
    """Images of one request may skip different steps; its usage is their sum."""
    backbone = backbone_of("pixart-sigma")
    thresholds = [0.05 * 1.05**i for i in range(30)]
    for threshold in thresholds:
        wanted = request(backbone, gate(REST, threshold), num_images=3)
        plan = resolve(backbone.spec, backbone.scheduler_config, wanted)
        trajectories = start(backbone, plan)
        while not trajectories[0].done:
            advance(backbone, trajectories)
        counts = [decisions(t)["skipped"] for t in trajectories]
        if len(set(counts)) > 1:
            break
    else:
        pytest.fail("no threshold told the images apart")
    [result] = generate(backbone, [wanted])
    [plain] = generate(backbone, [request(backbone, num_images=3)])
    [one] = generate(backbone, [request(backbone, gate(REST, ALWAYS, warmup=STEPS - 1))])
    saved = one.usage.macs_unaccelerated - one.usage.macs
    assert saved > 0
    assert plain.usage.macs - result.usage.macs == sum(counts) * saved
