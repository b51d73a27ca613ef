"""Schedulers as tables: a batched step gives what diffusers' own step gives, for every scheduler and in any mix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.solvers import batched
from models.solvers.batched import Move, Packed, combine, draw_noise, first_state, model_input, pack, stack
from models.solvers.names import REGISTRY, NoiseSchedule, noise_schedule, supported, takes
from models.solvers.probe import NotLinear
from models.solvers.tables import table

CPU = torch.device("cpu")
SHAPE = (4, 5, 3)  # channels, height, width: no two alike
BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def step(state: Tensor, predictions: Tensor, packed: Packed, noise: Tensor | None = None) -> Tensor:
    """A step along the rows' predictions."""
    return batched.step(state, combine(predictions, packed, state.shape[2]), packed, noise)


def preview(state: Tensor, predictions: Tensor, packed: Packed) -> Tensor:
    """The clean latents that the rows' predictions point to."""
    return batched.preview(state, combine(predictions, packed, state.shape[2]), packed)


def config(**options: Any) -> Any:
    """A model's noise schedule as its DDIM scheduler would save it."""
    return DDIMScheduler(**BETAS, **{"clip_sample": False, "steps_offset": 1, **options}).config


CONFIGS: dict[str, Any] = {
    "epsilon": config(set_alpha_to_one=False),
    "v_prediction": config(prediction_type="v_prediction", timestep_spacing="linspace"),
    "zero_snr": config(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True),
}
SKIPPING = {**CONFIGS["epsilon"], "skip_prk_steps": True}
CASTS = {"euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_karras", "flow"}
"""Those that round the sample to float32 before each step, whatever it comes in."""
COUNTS = (1, 4, 9, 25, 50)


def flow_schedule(steps: int, strength: float = 1.0, **options: Any) -> NoiseSchedule:
    """A prepared flow matching scheduler, the way `noise_schedule` prepares the others."""
    scheduler = FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options})
    scheduler.set_timesteps(steps)
    begin = steps - int(steps * strength)
    scheduler.set_begin_index(begin)
    return NoiseSchedule(scheduler, scheduler.timesteps[begin:], begin)


def network(x: Tensor, t: Tensor) -> Tensor:
    """A small non-linear model of samples [rows, channels, h, w] at times [rows], each row by itself."""
    mixed = 0.5 * x.roll(1, 1) - 0.3 * x.roll(1, 2) + 0.2 * x
    return torch.tanh(mixed + (t.to(x.dtype) / 1000)[:, None, None, None])


@dataclass(eq=False)
class Run:
    """One image's denoising; `exact` by diffusers' own loop, else through ticks of `advance`."""

    schedule: NoiseSchedule
    seed: int
    guidance: tuple[float, ...] = (1.0,)
    dtype: torch.dtype = torch.float64
    image: bool = False
    n: int = 0
    state: Tensor = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.noise = torch.randn(1, *SHAPE, generator=self.generator, dtype=self.dtype)
        self.clean = torch.randn(1, *SHAPE, generator=self.generator, dtype=self.dtype)
        self.table = table(self.schedule)
        a, b = self.table.add_noise if self.image else (0.0, self.table.init_noise_sigma)
        self.state = first_state(a * self.clean + b * self.noise, self.table.registers)

    @property
    def done(self) -> bool:
        return self.n == len(self.table)

    def predictions(self, x: Tensor, t: Tensor) -> list[Tensor]:
        """The predictions of each role: that of role r sees the sample shifted by r."""
        return [network(x + role, t) for role in range(len(self.guidance))]

    def exact(self, dtype: torch.dtype | None = None) -> Tensor:
        """The final latents of diffusers' loop, from the same first latents in any dtype."""
        scheduler, generator = self.schedule.fresh(), torch.Generator().manual_seed(self.seed)
        for _ in (self.noise, self.clean):
            torch.randn(1, *SHAPE, generator=generator, dtype=self.dtype)
        times = self.schedule.timesteps
        noise, clean = self.noise.to(dtype or self.dtype), self.clean.to(dtype or self.dtype)
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        if self.image and hasattr(scheduler, "add_noise"):
            x = scheduler.add_noise(clean, noise, times[:1])
        elif self.image:
            x = scheduler.scale_noise(clean, times[:1], noise)
        options = dict(takes(scheduler.__class__))
        if "generator" in options:
            options["generator"] = generator
        for t in times:
            given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            made = self.predictions(given, t[None])
            output = sum((w * m for w, m in zip(self.guidance[1:], made[1:], strict=True)), self.guidance[0] * made[0])
            x = scheduler.step(output, t, x, **options, return_dict=False)[0]
        return x.double()


def advance(runs: Sequence[Run]) -> None:
    """One tick: the rows of all first roles, then of all second ones, so that a run's rows are not neighbours."""
    rows = [(role, i) for role in range(3) for i, run in enumerate(runs) if role < len(run.guidance)]
    moves = [
        Move(
            run.table,
            run.n,
            tuple((rows.index((role, i)), weight) for role, weight in enumerate(run.guidance)),
            len(run.state),
        )
        for i, run in enumerate(runs)
    ]
    dtype = runs[0].dtype
    packed = pack(moves, dtype, CPU)
    state = stack([run.state for run in runs], packed)
    x = model_input(state, packed.input_scale, dtype).index_select(0, packed.owners)
    shift = torch.tensor([role for role, _ in rows], dtype=dtype)[:, None, None, None]
    predictions = network(x + shift, packed.timesteps.index_select(0, packed.owners))
    noise = draw_noise(moves, [run.generator for run in runs], SHAPE, dtype, CPU)
    for run, after in zip(runs, step(state, predictions, packed, noise).unbind(), strict=True):
        run.state, run.n = after, run.n + 1


def finish(runs: Sequence[Run]) -> list[Tensor]:
    """The final latents [1, channels, h, w] of runs that share every tick while they last."""
    while left := [run for run in runs if not run.done]:
        advance(left)
    return [run.state[:1].double() for run in runs]


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def cases(name: str, kind: str) -> Iterator[tuple[NoiseSchedule, bool]]:
    """Every schedule of a scheduler: step counts, whole and from an image half of the way in."""
    for steps in COUNTS:
        if name == "pndm" and steps == 1:
            continue  # its Runge-Kutta start needs four
        for strength in (1.0, 0.5) if steps in (4, 25) else (1.0,):
            if name == "flow":
                yield flow_schedule(steps, strength), strength < 1
            elif name == "pndm" and kind == "epsilon_skipping":
                yield noise_schedule("pndm", SKIPPING, steps, strength), strength < 1
            else:
                yield noise_schedule(name, CONFIGS[kind], steps, strength), strength < 1


EVERY = [(name, kind) for kind, values in CONFIGS.items() for name in supported(values)]
EVERY += [("pndm", "epsilon_skipping"), ("flow", "flow")]


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_batched_is_diffusers_own_loop(name: str, kind: str) -> None:
    """In float64, where only diffusers' rounding differs, and in float32, as it is served; all lengths in one batch.

    Euler's one step with zero terminal SNR takes latents of size 4096 to ones of size 1, so that in float32 diffusers'
    own is off by 4e-4. Without noise, which is drawn differently in float64, that is the measure for float32 too.
    """
    exactly, nearly = 1e-6 if name in CASTS else 1e-12, 1e-5
    if (name, kind) == ("euler_ancestral", "zero_snr"):
        nearly = 3e-5  # the same loss, of which the noise leaves a part to be seen
    for dtype, most in ((torch.float64, exactly), (torch.float32, nearly)):
        runs = [Run(s, seed, dtype=dtype, image=image) for seed, (s, image) in enumerate(cases(name, kind))]
        for run, found in zip(runs, finish(runs), strict=True):
            noisy = bool(run.table.coefficients[..., -1].any())
            expected = run.exact(dtype if noisy else torch.float64)
            assert deviation(found, expected) < most, (len(run.table), run.image, dtype)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_warped_times(name: str, kind: str) -> None:
    """Both are DPM-Solver++ then, which rounds the sample to float32."""
    schedules = [noise_schedule(name, CONFIGS[kind], 9, strength, warp) for warp in (0.5, 2.0) for strength in (1, 0.5)]
    runs = [Run(s, seed, image=s.begin > 0) for seed, s in enumerate(schedules)]
    for run, found in zip(runs, finish(runs), strict=True):
        assert deviation(found, run.exact()) < 1e-6, run.schedule.timesteps


def prepared(scheduler: Any, steps: int = 9) -> NoiseSchedule:
    """Any scheduler of diffusers, ready to run."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return NoiseSchedule(scheduler, scheduler.timesteps, 0)


FLOW: dict[str, Any] = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
OTHERS: dict[str, Callable[[], Any]] = {
    "third order": lambda: DPMSolverMultistepScheduler(**BETAS, solver_order=3),
    "of noise": lambda: DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="sde-dpmsolver++", solver_order=2, final_sigmas_type="sigma_min"
    ),
    "of flow": lambda: DPMSolverMultistepScheduler(**FLOW),
    "unipc of third order": lambda: UniPCMultistepScheduler(**BETAS, solver_order=3),
    "unipc of flow": lambda: UniPCMultistepScheduler(**FLOW),
    "unipc of noise predictions": lambda: UniPCMultistepScheduler(
        **BETAS, predict_x0=False, solver_type="bh1", final_sigmas_type="sigma_min"
    ),
    "without correction at first": lambda: UniPCMultistepScheduler(**BETAS, disable_corrector=[0, 1]),
    "of clean latents": lambda: DDIMScheduler(**BETAS, clip_sample=False, prediction_type="sample"),
    "stochastic flow": lambda: FlowMatchEulerDiscreteScheduler(shift=2.0, stochastic_sampling=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_schedulers_beyond_those_offered(name: str) -> None:
    """Nothing is known of a scheduler beforehand: other orders, predictions and kinds of noise come out as well."""
    run = Run(prepared(OTHERS[name]()), seed=3, dtype=torch.float32)
    assert deviation(finish([run])[0], run.exact()) < 1e-5


def mixed_runs(dtype: torch.dtype) -> list[Run]:
    """Ten runs of ten schedulers, step counts and scales, some from images, with one to three roles."""
    guidances = [(1.0,), (4.0, -3.0), (2.5, 1.5, -3.0)]
    schedules = [noise_schedule(n, CONFIGS["epsilon"], 4 + 2 * i, (0.5, 1)[i % 2]) for i, n in enumerate(REGISTRY)]
    schedules.append(flow_schedule(7))
    return [Run(s, seed, guidances[seed % 3], dtype, image=s.begin > 0) for seed, s in enumerate(schedules)]


def test_ten_schedulers_in_one_batch_are_each_alone() -> None:
    """To the bit, although they have one to six registers and one to three roles, and join and leave as they like."""
    alone = [finish([run])[0] for run in mixed_runs(torch.float32)]
    runs = mixed_runs(torch.float32)
    assert {run.table.registers for run in runs} == {1, 2, 3, 4, 6}
    for start in range(0, len(runs), 3):
        advance([run for run in runs[: start + 3] if not run.done])
    for run, found, expected in zip(runs, finish(runs), alone, strict=True):
        assert torch.equal(found, expected), type(run.schedule.scheduler)


def test_ten_schedulers_in_one_batch_are_diffusers() -> None:
    runs = mixed_runs(torch.float64)
    for run, found in zip(runs, finish(runs), strict=True):
        assert deviation(found, run.exact()) < 2e-6, type(run.schedule.scheduler)


@pytest.mark.parametrize("name", REGISTRY)
def test_registers_are_few(name: str) -> None:
    """Only what a later step reads; a run of any length needs no more."""
    registers = {"pndm": 6, "unipc": 4, "heun": 3, "dpmpp_2m": 2, "dpmpp_2m_karras": 2}.get(name, 1)
    for steps in (9, 50):
        assert table(noise_schedule(name, CONFIGS["epsilon"], steps)).registers == registers


def test_pndm_without_its_runge_kutta_start_keeps_three_outputs() -> None:
    assert table(noise_schedule("pndm", SKIPPING, 9)).registers == 4


NONLINEAR: dict[str, Callable[[], Any]] = {
    "ddim clips": lambda: DDIMScheduler(**BETAS, clip_sample=True),
    "ddim clips far out": lambda: DDIMScheduler(**BETAS, clip_sample=True, clip_sample_range=1000.0),
    "ddim thresholds": lambda: DDIMScheduler(**BETAS, clip_sample=False, thresholding=True),
    "lcm clips": lambda: LCMScheduler(**BETAS, clip_sample=True),
    "lcm thresholds": lambda: LCMScheduler(**BETAS, clip_sample=False, thresholding=True, sample_max_value=2.0),
    "heun clips": lambda: HeunDiscreteScheduler(**BETAS, clip_sample=True),
    "dpmpp thresholds": lambda: DPMSolverMultistepScheduler(**BETAS, thresholding=True),
    "unipc thresholds": lambda: UniPCMultistepScheduler(**BETAS, thresholding=True),
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_clipping_and_thresholding_are_not_linear(name: str) -> None:
    """The scheduler has to take its own step, at the second time of asking too."""
    for _ in range(2):
        with pytest.raises(NotLinear, match="is not linear: does it clip or threshold"):
            table(prepared(NONLINEAR[name]()))


class Remembering(DDIMScheduler):  # type: ignore[misc]
    """A scheduler that keeps something where nobody looks."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> tuple[Tensor]:
        memory = self.__dict__.setdefault("memory", {})
        stepped = super().step(model_output, timestep, sample, **options)[0] + 0.1 * memory.get("last", 0.0)
        memory["last"] = model_output.mean()
        return (stepped,)


class Adding(DDIMScheduler):  # type: ignore[misc]
    """A scheduler that moves the latents whatever the network says."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> tuple[Tensor]:
        return (super().step(model_output, timestep, sample, **options)[0] + 0.5,)


@pytest.mark.parametrize("scheduler", [Remembering, Adding])
def test_hidden_memory_and_constants_are_found(scheduler: type) -> None:
    with pytest.raises(NotLinear):
        table(prepared(scheduler(**BETAS, clip_sample=False)))


def test_coefficients_that_are_not_finite() -> None:
    """Noise cannot be told from a sample that is nothing but noise; diffusers divides by zero there."""
    zero = config(timestep_spacing="trailing", rescale_betas_zero_snr=True)
    with pytest.raises(NotLinear, match="not finite"):
        table(noise_schedule("ddim", zero, 5))


def test_tables_are_shared_by_content() -> None:
    """Not by the object that asks: two models of one noise schedule share, and any difference tells them apart."""
    base = config()
    first = table(noise_schedule("ddim", base, 8))
    assert table(noise_schedule("ddim", dict(base), 8)) is first
    others = [
        noise_schedule("ddim", base, 9),
        noise_schedule("ddim", base, 8, 0.5),
        noise_schedule("ddim", base, 8, 1.0, 2.0),
        noise_schedule("euler", base, 8),
        noise_schedule("ddim", {**base, "beta_end": 0.013}, 8),
        noise_schedule("ddim", config(prediction_type="v_prediction"), 8),
        flow_schedule(8),
    ]
    assert len({id(t) for t in [first, *map(table, others)]}) == 8


def test_noise_levels_tell_schedules_apart() -> None:
    """Flow matching takes its levels from the pipeline: with one config and the same times they may differ."""
    tables = []
    for levels in ([1.0, 0.7, 0.2], [0.9, 0.5, 0.1]):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=levels, timesteps=[1000.0, 600.0, 300.0])
        scheduler.set_begin_index(0)
        tables.append(table(NoiseSchedule(scheduler, scheduler.timesteps, 0)))
        after = [*levels[1:], 0.0]
        expected = [b - a for a, b in zip(levels, after, strict=True)]
        assert tables[-1].coefficients[:, 0, 1].tolist() == pytest.approx(expected, abs=1e-7)
    assert torch.equal(tables[0].timesteps, tables[1].timesteps)


def foretold(schedule: NoiseSchedule, scheduler: Any, result: Any, n: int, x: Tensor, m: Tensor) -> Tensor:
    """The clean latents that a step of diffusers pointed to; by DDIM's formula where the scheduler says nothing."""
    t = schedule.timesteps[n]
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return x - float(scheduler.sigmas[schedule.begin + n]) * m
    if isinstance(scheduler, DPMSolverMultistepScheduler | UniPCMultistepScheduler):
        clean: Tensor = scheduler.model_outputs[-1]
    elif hasattr(result, "pred_original_sample"):
        clean = result.pred_original_sample
    else:
        ddim = DDIMScheduler.from_config({**scheduler.config, "clip_sample": False})
        ddim.set_timesteps(4)
        clean = ddim.step(m, t, x).pred_original_sample
    return clean.double()


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_previews_are_where_the_prediction_points(name: str, kind: str) -> None:
    for schedule, _ in list(cases(name, kind))[:4]:
        scheduler, numbers = schedule.fresh(), table(schedule)
        options = {k: v for k, v in takes(scheduler.__class__).items() if k != "generator"}
        for n, t in enumerate(schedule.timesteps):
            x, m = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
            x *= numbers.init_noise_sigma
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            expected = foretold(schedule, scheduler, scheduler.step(m, t, x, **options), n, x, m)
            packed = pack([Move(numbers, n, ((0, 1.0),), numbers.registers)], torch.float64, CPU)
            found = preview(stack([first_state(x, numbers.registers)], packed), m, packed)
            assert deviation(found, expected) < 1e-5, n


def test_a_preview_of_nothing_but_noise_is_bounded() -> None:
    """The first step with zero terminal SNR: a prediction of noise says nothing, and nothing is divided by zero."""
    zero = config(timestep_spacing="trailing", rescale_betas_zero_snr=True)
    sample_weight, prediction_weight = table(noise_schedule("dpmpp_2m", zero, 5)).preview[0].tolist()
    assert (sample_weight, prediction_weight) == pytest.approx((1000, -1000), rel=1e-3)


def tick(count: int, guidance: tuple[float, ...] = (3.0, -2.0)) -> tuple[list[Move], list[Tensor]]:
    """The moves and states of `count` trajectories, PNDM first and then a mix, at the third of nine steps."""
    names = ("pndm", "unipc", "ddim", "heun", "dpmpp_2m", "lcm")
    tables = [table(noise_schedule(names[i % 6], CONFIGS["epsilon"], 9)) for i in range(count)]
    moves = [
        Move(t, 2, tuple((i + role * count, w) for role, w in enumerate(guidance)), t.registers)
        for i, t in enumerate(tables)
    ]
    generator = torch.Generator().manual_seed(5)
    return moves, [torch.randn(t.registers, *SHAPE, generator=generator) for t in tables]


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_operators_do_not_grow_with_trajectories() -> None:
    """Packing, stacking, both ends of the network and the preview: as many operators for 60 trajectories as for six."""
    counts = {}
    for count in (1, 6, 32, 60):
        moves, states = tick(count)
        predictions, noise = torch.zeros(2 * count, *SHAPE), torch.zeros(count, *SHAPE)
        with Operators() as operators:  # type: ignore[no-untyped-call]
            packed = pack(moves, torch.float32, CPU)
            state = stack(states, packed)
            model_input(state, packed.input_scale, torch.bfloat16)
            preview(state, predictions, packed)
            step(state, predictions, packed, noise).unbind()
        counts[count] = operators.count
    assert counts[6] == counts[32] == counts[60] < counts[1] + 8 < 160, counts


def unit_tick(*guidances: tuple[float, ...]) -> Packed:
    """Packed DDIM moves, the rows of each in a block."""
    numbers, first, moves = table(noise_schedule("ddim", CONFIGS["epsilon"], 4)), 0, []
    for guidance in guidances:
        moves.append(Move(numbers, 1, tuple((first + i, w) for i, w in enumerate(guidance)), 1))
        first += len(guidance)
    return pack(moves, torch.float32, CPU)


def test_guidance_of_each_trajectory() -> None:
    """None, a pair and three roles, to the number, of predictions in bfloat16."""
    packed = unit_tick((1.0,), (4.0, -3.0), (2.0, 1.0, -2.0))
    rows = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.bfloat16)[:, None, None, None]
    found = combine(rows.expand(-1, *SHAPE), packed, SHAPE[0])
    assert found.dtype == torch.float32
    assert found[:, 0, 0, 0].tolist() == [1.0, 4 * 2 - 3 * 4, 2 * 8 + 16 - 2 * 32]
    assert packed.owners.tolist() == [0, 1, 1, 2, 2, 2]


def test_learned_variance_is_left_out() -> None:
    packed = unit_tick((1.0,), (4.0, -3.0))
    mean, variance = torch.randn(2, 3, *SHAPE)
    both = torch.cat([mean, variance], dim=1)
    state = torch.randn(2, 1, *SHAPE)
    assert torch.equal(step(state, both, packed), step(state, mean, packed))


def test_a_row_that_is_not_a_number_stays_alone() -> None:
    """Its neighbours have fewer roles or registers, and nothing of it stands in for those that they lack."""
    moves, states = tick(4)
    moves = [dataclasses.replace(m, predictions=m.predictions[: 2 - i % 2]) for i, m in enumerate(moves)]
    predictions, noise = torch.randn(8, *SHAPE), torch.randn(4, *SHAPE)
    packed = pack(moves, torch.float32, CPU)
    well = step(stack(states, packed), predictions, packed, noise)
    states[0], predictions[0] = states[0] * float("nan"), float("inf")
    ill = step(stack(states, packed), predictions, packed, noise)
    assert not torch.isfinite(ill[0, 0]).any()
    assert torch.equal(ill[1:], well[1:])


def test_noise_is_drawn_as_diffusers_draws_it() -> None:
    """Only by the steps that draw, each from its own generator, which stands afterwards where diffusers leaves it."""
    names = ["lcm", "ddim", "euler_ancestral"]
    schedules = [noise_schedule(name, CONFIGS["epsilon"], 4) for name in names]
    assert table(schedules[0]).draws == (True, True, True, False)
    assert table(schedules[1]).draws == (False, False, False, False)
    assert table(schedules[2]).draws == (True, True, True, True)
    moves = [Move(table(s), 0, ((i, 1.0),), 1) for i, s in enumerate(schedules)]
    generators, own = ([torch.Generator().manual_seed(9 + i) for i in range(3)] for _ in range(2))
    noise = draw_noise(moves, generators, SHAPE, torch.float32, CPU)
    assert noise is not None
    for i in (0, 2):
        x = torch.randn(1, *SHAPE)
        schedules[i].fresh().step(x, schedules[i].timesteps[0], x, generator=own[i])
        assert torch.equal(own[i].get_state(), generators[i].get_state())
        again = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9 + i))
        assert torch.equal(noise[i], again)
    assert torch.equal(own[1].get_state(), generators[1].get_state())
    assert not noise[1].any()
    assert draw_noise(moves[1:2], generators[1:2], SHAPE, torch.float32, CPU) is None


def test_a_step_without_its_noise_is_refused() -> None:
    numbers = table(noise_schedule("lcm", CONFIGS["epsilon"], 4))
    packed = pack([Move(numbers, 0, ((0, 1.0),), 1)], torch.float32, CPU)
    with pytest.raises(ValueError, match="draws noise, and none is given"):
        step(torch.zeros(1, 1, *SHAPE), torch.zeros(1, *SHAPE), packed)


def test_what_a_table_promises() -> None:
    """Frozen, in float64 on the CPU, and usable under inference mode and outside, wherever it was made."""
    schedule = noise_schedule("unipc", CONFIGS["v_prediction"], 11)
    with torch.inference_mode():
        numbers = table(schedule)
    assert len(numbers) == 11
    assert numbers.coefficients.shape == (11, 4, 6)
    assert torch.equal(numbers.timesteps, schedule.timesteps.double())
    for value in vars(numbers).values():
        if isinstance(value, Tensor):
            assert (value.dtype, value.device, value.is_inference()) == (torch.float64, CPU, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        numbers.draws = ()  # type: ignore[misc]
