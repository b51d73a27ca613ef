"""From settings to warm models: what is loaded with what, what the warm-up runs, and how many rows a tick it finds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from app.engine import loading
from app.engine.pace import FIRST_GUESS, Pace
from app.metrics import Metrics
from app.settings import Settings
from models import Backbone, device
from models.costs.counter import MacCounter

Backbones = Callable[..., Backbone]
Costs = Callable[[int], float]


class Clock:
    """A time that passes only where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class Instant:
    """A network that answers zeros at once; on the clock a forward of n rows takes `cost(n)`, its first one twice."""

    def __init__(self, network: Any, clock: Clock, cost: Costs) -> None:
        self._network, self._clock, self._cost = network, clock, cost
        self.rows: list[int] = []
        self.given: list[dict[str, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """Note the batch, let time pass."""
        self._clock.now += self._cost(len(x)) * (1 if len(x) in self.rows else 2)
        self.rows.append(len(x))
        self.given.append(next(part for part in rest if isinstance(part, dict)))
        return torch.zeros_like(x)


class Watched:
    """A VAE that notes the latents it decodes."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self.shapes: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def decode(self, latents: Tensor, **options: Any) -> Any:
        """Note the shape, then decode."""
        self.shapes.append(tuple(latents.shape))
        return self._vae.decode(latents, **options)


Warmed = Callable[..., tuple[Backbone, Instant, Watched]]


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch, backbone_of: Backbones) -> Warmed:
    """The backbone of a layout whose forwards take what they are told."""
    clock = Clock(monkeypatch)

    def backbone(layout: str, cost: Costs) -> tuple[Backbone, Instant, Watched]:
        whole = backbone_of(layout)
        network, vae = Instant(whole.network, clock, cost), Watched(whole.parts.vae)
        pipeline = copy(whole.parts.pipeline)
        pipeline.vae = vae
        return replace(whole, network=network, parts=replace(whole.parts, pipeline=pipeline)), network, vae

    return backbone


def settings(*names: str, **options: Any) -> Settings:
    return Settings(model=names or ("m",), **options)


def falling(until: int) -> Costs:
    """A cost a tick that makes rows cheaper up to a number of them, and 2 % dearer after each doubling beyond."""
    return lambda rows: 0.001 * until if rows <= until else 0.00102 * rows


def by_tick(rows: list[int]) -> list[int]:
    """The rows of a warm-up's ticks; every number of rows runs WARM_TICKS times."""
    assert len(rows) % 3 == 0
    ticks = rows[::3]
    assert rows == [n for n in ticks for _ in range(3)]
    return ticks


@pytest.mark.parametrize("layout", ["sd", "pixart-alpha", "dit"])
def test_a_given_number_of_rows_is_warmed_with_one_guided_pair(layout: str, instant: Warmed) -> None:
    backbone, network, vae = instant(layout, lambda rows: 0.3 * rows)
    pace = Pace()
    assert loading.warm_all({"m": backbone}, settings(max_rows=6), Metrics(), pace) == {"m": 6}
    assert by_tick(network.rows) == [2]
    assert vae.shapes == [(1, 4, 16, 16)]
    assert pace.predict([("m", 1)]) == pytest.approx(0.3)  # the fastest of three, not the slow first one
    if layout == "dit":
        assert {tuple(given["class_labels"].tolist()) for given in network.given} == {(0, 1000)}


def test_each_models_knee_is_its_own(instant: Warmed) -> None:
    small, small_network, _ = instant("sd", falling(until=4))
    large, large_network, _ = instant("pixart-alpha", falling(until=16))
    pace = Pace()
    caps = loading.warm_all({"small": small, "large": large}, settings("small", "large"), Metrics(), pace)
    assert caps == {"small": 4, "large": 16}
    assert by_tick(small_network.rows) == [2, 4, 8, 16, 32, 64] * 5 + [4]
    assert by_tick(large_network.rows) == [2, 4, 8, 16, 32, 64] * 5 + [16]
    assert pace.predict([("small", 1)]) == pytest.approx(0.001)
    assert pace.predict([("large", 1)]) == pytest.approx(0.001)
    assert pace.predict([("m", 1)]) == FIRST_GUESS


def test_the_pace_is_that_of_the_cap(instant: Warmed) -> None:
    """Not of two rows, which cost more each."""
    backbone, _, _ = instant("sd", lambda rows: 0.01 + 0.001 * rows)
    pace = Pace()
    assert loading.warm_all({"m": backbone}, settings(), Metrics(), pace) == {"m": 64}
    assert pace.predict([("m", 1)]) == pytest.approx((0.01 + 0.064) / 64)


def test_unguided_models_are_measured_at_as_many_rows(instant: Warmed) -> None:
    """A row an image: the ticks have twice the images, not half the rows."""
    backbone, network, _ = instant("sd", falling(until=8))
    backbone = replace(backbone, spec=replace(backbone.spec, default_guidance_scale=1.0))
    assert loading.warm_all({"m": backbone}, settings(), Metrics(), Pace()) == {"m": 8}
    assert by_tick(network.rows) == [2, 4, 8, 16, 32, 64] * 5 + [8]


def test_measuring_ends_with_the_time_for_it(instant: Warmed) -> None:
    """Four seconds for three ticks of each number: 0.24 and 0.4 s are spent, the next would take 0.8 s."""
    backbone, network, _ = instant("sd", {2: 0.24, 4: 0.4}.__getitem__)
    assert loading.warm_all({"m": backbone}, settings(), Metrics(), Pace()) == {"m": 4}
    assert by_tick(network.rows) == [2, 4, 2, 4, 4]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_without_memory_for_more_it_serves_one_pair_at_a_time(
    error: type[Exception], instant: Warmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[bool] = []
    monkeypatch.setattr(loading, "release_memory", lambda: released.append(True))

    def cost(rows: int) -> float:
        if rows > 4:
            raise error("no room")
        return 0.02 * rows

    backbone, network, _ = instant("sd", cost)
    pace = Pace()
    assert loading.warm_all({"m": backbone}, settings(), Metrics(), pace) == {"m": 2}
    assert by_tick(network.rows) == [2, 4, 2]
    assert released == [True]
    assert pace.predict([("m", 1)]) == pytest.approx(0.02)


def test_another_error_of_the_warm_up_stops_the_start(instant: Warmed) -> None:
    def broken(rows: int) -> float:
        raise ZeroDivisionError

    backbone, _, _ = instant("sd", broken)
    with pytest.raises(ZeroDivisionError):
        loading.warm_all({"m": backbone}, settings(), Metrics(), Pace())


@pytest.mark.parametrize(("given", "cap"), [({}, 2), ({"max_rows": 12}, 12)])
def test_a_model_that_http_cannot_prompt_is_served_unmeasured(
    given: dict[str, Any], cap: int, instant: Warmed, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, network, _ = instant("sd", lambda rows: 0.1)
    silent = replace(backbone, spec=replace(backbone.spec, has_text_encoder=False))
    with caplog.at_level(logging.WARNING):
        assert loading.warm_all({"m": silent}, settings(**given), Metrics(), Pace()) == {"m": cap}
    assert not network.rows
    assert "m has no text encoder" in caplog.text


def test_a_gpu_may_take_more_rows_than_a_cpu() -> None:
    assert loading.MOST_ROWS == {"cpu": 64, "cuda": 256}


def test_the_weights_of_every_model_are_reported(backbone_of: Backbones, student_of: Backbones) -> None:
    metrics, plain, taught = Metrics(), backbone_of("pixart-alpha"), student_of("sd")
    loading.warm_all({"plain": plain, "taught": taught}, settings("plain", "taught", max_rows=2), metrics, Pace())
    found = {
        (model, part): metrics.registry.get_sample_value(
            "slipstream_model_weight_bytes", {"model": model, "part": part}
        )
        for model in ("plain", "taught")
        for part in ("base", "text_encoder", "adapter")
    }
    assert found == {
        ("plain", "base"): plain.weight_bytes() - plain.encoder_bytes(),
        ("plain", "text_encoder"): plain.encoder_bytes(),
        ("plain", "adapter"): 0,
        ("taught", "base"): taught.weight_bytes() - taught.encoder_bytes(),
        ("taught", "text_encoder"): taught.encoder_bytes(),
        ("taught", "adapter"): taught.adapter_bytes(),
    }
    assert taught.adapter_bytes() > 0
    assert 0 < taught.encoder_bytes() < taught.weight_bytes()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, backbone_of: Backbones) -> list[tuple[str, dict[str, Any]]]:
    """What was asked of `models.load`, which answers with a small model laid out as it came."""
    made: list[tuple[str, dict[str, Any]]] = []

    def load(name: str, **options: Any) -> Backbone:
        made.append((name, options))
        return backbone_of("sd")

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(Backbone, "channels_last", lambda self: None)
    monkeypatch.setattr(loading, "keep_freed_memory", lambda: None)
    return made


@pytest.mark.parametrize(
    ("asked", "fast", "given"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("float16", True, torch.float16),
        ("float32", True, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_that_is_faster(
    asked: str,
    fast: bool,
    given: torch.dtype,
    pipeline_dir: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "fast_bfloat16", lambda where: fast and where == torch.device("cpu"))
    monkeypatch.setattr(loading, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(loading, "warm_all", lambda *_: {})
    backbones, _ = loading.load_all(settings(str(pipeline_dir("dit")), device="cpu", dtype=asked), Metrics(), Pace())
    weights = next(backbones["dit"].network.module.parameters())
    assert (backbones["dit"].dtype, weights.dtype, weights.device) == (given, given, torch.device("cpu"))


def test_every_model_gets_its_own_files(calls: list[tuple[str, dict[str, Any]]]) -> None:
    chosen = settings(
        "/models/one",
        "org/two",
        adapter=("one=/a/first", "two=/a/second"),
        plan=("two=/p/D3.json", "one=/p/D1.json", "one=/p/D2.json"),
        profile=("two=/q/mine.json",),
        config=("two=/c/two",),
        depth=("two=4",),
        compile=True,
        stepping="batched",
        device="cpu",
        dtype="float32",
        max_rows=2,
    )
    metrics = Metrics()
    backbones, caps = loading.load_all(chosen, metrics, Pace())
    assert list(backbones) == ["one", "two"]
    assert caps == {"one": 2, "two": 2}
    common = {"device": torch.device("cpu"), "dtype": "float32", "compile": True, "stepping": "batched"}
    common |= {"offload_text_encoders": False, "batch_invariant": False, "max_adapter_bytes": 4 * 2**30}
    one: dict[str, Any] = {
        "adapters": {"first": Path("/a/first")},
        "controls": {},
        "plans": {n: Path(f"/p/{n}.json") for n in ("D1", "D2")},
        "profiles": {},
    }
    one |= {"config": None, "depth": None}
    two: dict[str, Any] = {
        "adapters": {"second": Path("/a/second")},
        "controls": {},
        "plans": {"D3": Path("/p/D3.json")},
    }
    two |= {"profiles": {"mine": Path("/q/mine.json")}}
    two |= {"config": Path("/c/two"), "depth": 4}
    assert calls == [("/models/one", one | common), ("org/two", two | common)]
    names = [metrics.registry.get_sample_value("slipstream_model_load_duration_seconds", {"model": n}) for n in caps]
    assert all(seconds is not None and seconds >= 0 for seconds in names)


def test_on_a_cpu_convolutions_are_laid_out_and_freed_memory_is_kept(
    pipeline_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(loading, "keep_freed_memory", lambda: kept.append(True))
    chosen = settings(str(pipeline_dir("sd")), device="cpu", dtype="float32", max_rows=2)
    with caplog.at_level(logging.INFO):
        backbones, _ = loading.load_all(chosen, Metrics(), Pace())
    weights = [p for p in backbones["sd"].network.module.parameters() if p.ndim == 4 and p.shape[-1] == 3]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert kept == [True]
    assert "loaded sd in" in caplog.text
    assert "MiB on cpu as torch.float32" in caplog.text


def test_a_model_whose_macs_cannot_be_counted_is_served_nevertheless(
    instant: Warmed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, _, _ = instant("sd", falling(until=4))
    assert loading.warm_all({"m": backbone}, settings(max_rows=4), Metrics(), Pace()) == {"m": 4}
    assert "network" in vars(backbone.counter), "it is made before the first request"
    assert not caplog.records

    def broken(self: MacCounter, *arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(MacCounter, "at", broken)
    assert loading.warm_all({"m": backbone}, settings(max_rows=4), Metrics(), Pace()) == {"m": 4}
    assert "the MACs of m cannot be counted" in caplog.text


def test_the_next_start_begins_with_what_was_measured(instant: Warmed, tmp_path: Path) -> None:
    backbone, network, _ = instant("sd", falling(until=8))
    given = settings(data_dir=tmp_path)
    assert loading.warm_all({"m": backbone}, given, Metrics(), Pace()) == {"m": 8}
    measured = len(network.rows)
    pace = Pace()
    assert loading.warm_all({"m": backbone}, given, Metrics(), pace) == {"m": 8}
    assert by_tick(network.rows[measured:]) == [8], "one tick, for the pace"
    assert pace.rows["m"].cap == 8
    other = replace(backbone, spec=replace(backbone.spec, config_hash="other"))
    loading.warm_all({"m": other}, given, Metrics(), Pace())
    assert len(network.rows) > measured + 3, "another model is measured"


def test_rows_that_are_a_setting_are_not_chosen_anew(instant: Warmed, tmp_path: Path) -> None:
    backbone, _, _ = instant("sd", falling(until=8))
    pace = Pace()
    loading.warm_all({"m": backbone}, settings(max_rows=4, data_dir=tmp_path), Metrics(), pace)
    assert pace.rows == {}
    assert list(tmp_path.iterdir()) == []
