"""From settings to warm models: loads each once, runs it once, and measures how many rows a tick pay."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

import models
from app.adapters import AdapterFiles
from app.engine.pace import Pace, measure
from app.engine.rows import Kept, Rows, said
from app.logs import SERVER
from app.metrics import Metrics
from app.settings import Settings
from models.backbone import Backbone
from models.costs.macs import counts_of
from models.denoise import advance
from models.device import find_device, keep_freed_memory, out_of_memory, release_memory, thread_count, wait
from models.generate import decode, start
from models.resolve import least_request, resolve
from models.reuse.plans import RowPlan
from models.spec import short_name

MEASURE_SECONDS = 4.0
"""Time a model may take for measuring its rows a tick."""
WARM_TICKS = 3
"""Ticks of one number of rows, of which the fastest counts: the first ones of each number make its buffers."""
MOST_ROWS = {"cpu": 64, "cuda": 256}


def load_all(settings: Settings, metrics: Metrics, pace: Pace) -> tuple[dict[str, Backbone], dict[str, int]]:
    """Load and warm every model of the settings. Raises `ModelLoadError` for one that cannot be served."""
    backbones = {short_name(name): _load(name, settings, metrics) for name in settings.model}
    return backbones, warm_all(backbones, settings, metrics, pace)


def warm_all(backbones: Mapping[str, Backbone], settings: Settings, metrics: Metrics, pace: Pace) -> dict[str, int]:
    """Run each model once, and return how many rows each of its ticks may have."""
    caps = {}
    files = AdapterFiles(settings.data_dir, settings.store_bytes)
    for name, backbone in backbones.items():
        files.restore(name, backbone)
        encoders = backbone.encoder_bytes()
        metrics.weight_bytes.labels(name, "base").set(backbone.weight_bytes() - encoders)
        metrics.weight_bytes.labels(name, "text_encoder").set(encoders)
        metrics.weight_bytes.labels(name, "adapter").set_function(backbone.adapter_bytes)
        metrics.adapter_bytes.labels(name).set_function(backbone.adapter_bytes)
        metrics.weight_bytes.labels(name, "control").set(backbone.control_bytes())
        caps[name] = _warm(name, backbone, settings, pace)
        _count(name, backbone)
    return caps


def _count(name: str, backbone: Backbone) -> None:
    """Count a row once, so that no request waits until there is what counts."""
    try:
        counts_of(backbone, backbone.spec.native_width, backbone.spec.native_height).row(RowPlan())
    except Exception:
        SERVER.exception("the MACs of %s cannot be counted: its answers will not have them", name)


def _load(name: str, settings: Settings, metrics: Metrics) -> Backbone:
    began = time.monotonic()
    short = short_name(name)
    device = find_device(settings.device)
    backbone = models.load(
        name,
        device=device,
        dtype=settings.dtype,
        adapters=settings.files("adapter", short),
        controls=settings.files("control", short),
        plans=settings.files("plan", short),
        profiles=settings.files("profile", short),
        config=settings.config_of(short),
        depth=settings.blocks(short),
        stepping=settings.stepping,
        compile=settings.compile,
        offload_text_encoders=settings.offload_text_encoders,
        batch_invariant=settings.batch_invariant,
        max_adapter_bytes=settings.max_adapter_bytes,
    )
    if device.type == "cpu":
        keep_freed_memory()
        backbone.channels_last()
    seconds = time.monotonic() - began
    metrics.load_seconds.labels(short).set(seconds)
    megabytes = backbone.weight_bytes() / 2**20
    SERVER.info("loaded %s in %.1f s: %.0f MiB on %s as %s", short, seconds, megabytes, backbone.device, backbone.dtype)
    return backbone


def _warm(name: str, backbone: Backbone, settings: Settings, pace: Pace) -> int:
    """One tick and one decode, and the measured cap of rows where the settings leave it open."""
    spec = backbone.spec
    if spec.asks_for_embeddings:
        SERVER.warning("%s has no text encoder: requests over HTTP cannot give it a prompt", name)
        return settings.max_rows if isinstance(settings.max_rows, int) else 2

    def tick(rows: int) -> float:
        run = resolve(spec, backbone.scheduler_config, least_request(spec, num_inference_steps=WARM_TICKS))
        each = run.steps[0].num_rows
        run = replace(run, seeds=(0,) * max(1, rows // each))
        trajectories = start(backbone, run)
        seconds = []
        for _ in range(WARM_TICKS):
            began = time.perf_counter()
            advance(backbone, trajectories)
            wait(backbone.device)
            seconds.append(time.perf_counter() - began)
        pace.observe_tick(name, each * len(trajectories), min(seconds))
        return min(seconds)

    smallest = resolve(spec, backbone.scheduler_config, least_request(spec, num_inference_steps=1))
    decode(backbone, [start(backbone, smallest)[0].latents])
    if isinstance(settings.max_rows, int):
        pace.observe(name, 2, tick(2))
        return settings.max_rows
    kept, key = Kept(settings.data_dir), _measured_as(name, backbone)
    costs, how = kept.read(key), "as kept"
    if costs is None:
        try:
            costs = measure(tick, MOST_ROWS.get(backbone.device.type, 64), MEASURE_SECONDS / WARM_TICKS)
        except Exception as error:
            if not out_of_memory(error):
                raise
            release_memory()
            pace.observe(name, 2, tick(2))
            SERVER.info("%s: up to 2 rows a tick: no memory for more", name)
            return 2
        how = "measured"
        kept.write(key, costs)
    pace.rows[name] = chosen = Rows(costs, partial(kept.write, key))
    pace.observe(name, chosen.cap, tick(chosen.cap))
    SERVER.info("%s: up to %d rows a tick; ms a row %s: %s", name, chosen.cap, how, said(costs))
    return chosen.cap


def _measured_as(name: str, backbone: Backbone) -> str:
    """What a measurement is of: another model, device, precision, number of threads or version is measured anew."""
    spec = backbone.spec
    device = torch.cuda.get_device_name(backbone.device) if backbone.device.type == "cuda" else platform.machine()
    facts = (name, spec.config_hash, device, backbone.dtype, f"{thread_count()} threads", f"torch {torch.__version__}")
    return " ".join(map(str, facts))
