"""The dashboard as data: `python deploy/grafana/build.py` writes dashboards/slipstream.json, which Grafana reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "dashboards" / "slipstream.json"
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
INSTANCE = 'instance=~"$instance"'
MODEL = f'model=~"$model",{INSTANCE}'
EACH = "model, instance"
GPU = "GPU {{gpu}} {{Hostname}}"


@dataclass(frozen=True)
class Panel:
    """One panel: PromQL queries with their legends; the width in Grafana's 24 columns."""

    title: str
    about: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    width: int = 8
    kind: str = "timeseries"
    stack: bool = False


def rate(metric: str, by: str = "", extra: str = "", labels: str = MODEL) -> str:
    """Events a second, summed over everything but `by`."""
    return f"sum by ({by}) (rate({metric}{{{labels}{extra}}}[$__rate_interval]))"


def quantile(q: float, metric: str, by: str = "", extra: str = "", labels: str = MODEL) -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({q}, {rate(metric + '_bucket', f'{by}, le' if by else 'le', extra, labels)})"


def mean(metric: str, by: str) -> str:
    """The mean of a histogram."""
    return f"{rate(metric + '_sum', by)} / {rate(metric + '_count', by)}"


def total(metric: str, by: str = "", labels: str = INSTANCE) -> str:
    """A gauge summed over everything but `by`."""
    return f"sum by ({by}) ({metric}{{{labels}}})"


def gpu(metric: str) -> str:
    """A gauge of DCGM's exporter by card; the exporter's own instance is not a server's, so all cards are shown."""
    return f"max by (Hostname, gpu) ({metric})"


def stat(title: str, about: str, unit: str, query: str) -> Panel:
    """One number."""
    return Panel(title, about, unit, ((query, ""),), width=4, kind="stat")


REQUESTS, DURATION, MACS = "slipstream_requests_total", "slipstream_request_duration_seconds", "slipstream_macs_total"
STEPS, REDUCED = "slipstream_denoise_steps_total", ',kind="reduced"'
EVALUATIONS, FORETOLD = "slipstream_network_evaluations_total", ',kind="forecast"'
GATES, SKIPPED = "slipstream_gate_decisions_total", ',decision="skipped"'
OK, FAILED, SAVED = ',outcome="ok"', ',outcome=~"error|deadline"', ',kind="saved"'

ROWS: dict[str, tuple[Panel, ...]] = {
    "Overview": (
        stat(
            "Ready", "Servers with weights loaded, warm, engine alive, not draining.", "none", total("slipstream_ready")
        ),
        stat("Requests", "All outcomes.", "reqps", rate(REQUESTS)),
        stat(
            "Failing",
            "Server errors and missed deadlines, as a part of all requests.",
            "percentunit",
            f"({rate(REQUESTS, extra=FAILED)} or vector(0)) / {rate(REQUESTS)}",
        ),
        stat("p95", "From arrival to the answer; successes only.", "s", quantile(0.95, DURATION, extra=OK)),
        stat("Waiting", "Requests in the queue.", "none", total("slipstream_requests_waiting")),
        stat(
            "MACs saved",
            "Part of the work without acceleration.",
            "percentunit",
            f"{rate(MACS, extra=SAVED)} / {rate(MACS)}",
        ),
        Panel("Requests by outcome", "", "reqps", ((rate(REQUESTS, "outcome"), "{{outcome}}"),), stack=True),
        Panel(
            "Requests by acceleration", "", "reqps", ((rate(REQUESTS, "acceleration"), "{{acceleration}}"),), stack=True
        ),
        Panel(
            "Queue",
            "Waiting near capacity means that new requests are about to get 429.",
            "none",
            (
                (total("slipstream_requests_running", "instance"), "running {{instance}}"),
                (total("slipstream_requests_waiting", "instance"), "waiting {{instance}}"),
                (total("slipstream_queue_capacity", "instance"), "capacity {{instance}}"),
            ),
        ),
        Panel(
            "Latency by acceleration",
            "From arrival to the answer; successes only.",
            "s",
            tuple(
                (quantile(q, DURATION, "acceleration", OK), f"p{q * 100:.0f} {{{{acceleration}}}}")
                for q in (0.5, 0.95, 0.99)
            ),
            width=12,
        ),
        Panel(
            "Time in the queue",
            "Compare with the latency: high here means too little capacity, low here means long requests.",
            "s",
            tuple(
                (quantile(q, "slipstream_queue_duration_seconds", "model"), f"p{q * 100:.0f} {{{{model}}}}")
                for q in (0.5, 0.95)
            ),
            width=12,
        ),
        Panel(
            "Where the time goes",
            "Seconds spent in each stage, a second.",
            "s",
            ((rate("slipstream_stage_duration_seconds_sum", "stage", labels=INSTANCE), "{{stage}}"),),
            stack=True,
        ),
        Panel(
            "Turned away",
            "429 and 503, by reason.",
            "reqps",
            ((rate("slipstream_requests_rejected_total", "reason", labels=INSTANCE), "{{reason}}"),),
        ),
        Panel(
            "Given up",
            "Requests that ended early, by cause.",
            "reqps",
            ((rate("slipstream_requests_cancelled_total", "cause", labels=INSTANCE), "{{cause}}"),),
        ),
    ),
    "Servers": (
        Panel(
            "Requests by server",
            "What a balancer gives each; all outcomes.",
            "reqps",
            ((rate(REQUESTS, "instance"), "{{instance}}"),),
            stack=True,
        ),
        Panel(
            "p95 by server",
            "From arrival to the answer; successes only. One far above the others has a slower device or a neighbour.",
            "s",
            ((quantile(0.95, DURATION, "instance", OK), "{{instance}}"),),
        ),
        Panel(
            "Connections",
            "Open ones.",
            "none",
            ((total("slipstream_connections", "instance"), "{{instance}}"),),
        ),
    ),
    "Batching": (
        Panel(
            "Rows a tick",
            "How full the batch is. Low while requests wait: raise the rows a tick.",
            "none",
            (
                (mean("slipstream_tick_rows", EACH), "mean {{model}} {{instance}}"),
                (quantile(0.95, "slipstream_tick_rows", EACH), "p95 {{model}} {{instance}}"),
            ),
        ),
        Panel(
            "Plans a tick",
            "Different step plans that shared one forward.",
            "none",
            (
                (mean("slipstream_tick_plans", EACH), "mean {{model}} {{instance}}"),
                (quantile(0.95, "slipstream_tick_plans", EACH), "p95 {{model}} {{instance}}"),
            ),
        ),
        Panel(
            "Tick duration",
            "One forward and one scheduler step of every trajectory in it.",
            "s",
            tuple(
                (
                    quantile(q, "slipstream_tick_duration_seconds", EACH),
                    f"p{q * 100:.0f} {{{{model}}}} {{{{instance}}}}",
                )
                for q in (0.5, 0.95)
            ),
        ),
        Panel(
            "Denoising steps",
            "A reduced step ran less than the whole network.",
            "ops",
            ((rate(STEPS, "kind"), "{{kind}}"),),
            stack=True,
        ),
        Panel(
            "Reduced steps by acceleration",
            "Part of all steps.",
            "percentunit",
            (
                (
                    f"{rate(STEPS, 'acceleration', REDUCED)} / {rate(STEPS, 'acceleration')}",
                    "{{acceleration}}",
                ),
            ),
        ),
        Panel(
            "MACs",
            "Multiply-accumulates a second, done and saved.",
            "ops",
            ((rate(MACS, "kind"), "{{kind}}"),),
            stack=True,
        ),
        Panel(
            "What auto chose",
            "Runs a second by the candidate of a profile; moved: flexible requests made cheaper for their deadline.",
            "ops",
            (
                (rate("slipstream_auto_choices_total", "candidate"), "{{candidate}}"),
                (rate("slipstream_auto_moved_total", labels=INSTANCE), "moved"),
            ),
        ),
        Panel(
            "Gates that skip",
            "Of the steps in which a cache decides while it runs, the part that it skips.",
            "percentunit",
            (
                (
                    f"{rate(GATES, 'mode', SKIPPED)} / {rate(GATES, 'mode')}",
                    "{{mode}}",
                ),
            ),
        ),
        Panel(
            "Forecasts",
            "Of the images' predictions, the part that was foretold and not computed.",
            "percentunit",
            ((f"{rate(EVALUATIONS, 'model', FORETOLD)} / {rate(EVALUATIONS, 'model')}", "{{model}}"),),
        ),
        Panel("Images", "", "ops", ((rate("slipstream_images_total", "model"), "{{model}}"),), width=12),
        Panel(
            "Rows a tick, spread",
            "",
            "none",
            ((rate("slipstream_tick_rows_bucket", "le"), "{{le}}"),),
            width=12,
            kind="heatmap",
        ),
    ),
    "Memory": (
        Panel(
            "GPU memory",
            "Used counts every process on the device; allocated and reserved are this server's.",
            "bytes",
            tuple(
                (f"slipstream_gpu_memory_{what}_bytes{{{INSTANCE}}}", f"{what} {{{{device}}}} {{{{instance}}}}")
                for what in ("used", "total", "allocated", "reserved", "peak")
            ),
            width=12,
        ),
        Panel(
            "Feature memory",
            "What the accelerators remember between steps; back to zero when nothing runs.",
            "bytes",
            ((total("slipstream_feature_memory_bytes", EACH, MODEL), "{{model}} {{instance}}"),),
            width=12,
            stack=True,
        ),
        Panel(
            "Held for clients",
            "What unanswered requests keep, bodies that are being read, files on their way to the store; bounded each.",
            "bytes",
            tuple(
                (total(f"slipstream_{what}_bytes", "instance"), f"{what} {{{{instance}}}}")
                for what in ("waiting", "body", "spool")
            ),
        ),
        Panel(
            "Weights",
            "Base models, and the adapters beside them.",
            "bytes",
            ((total("slipstream_model_weight_bytes", f"{EACH}, part", MODEL), "{{model}} {{part}} {{instance}}"),),
            stack=True,
        ),
        Panel(
            "Kept for the next time",
            "LoRAs on the device, and encoded prompts; what was used longest ago goes first.",
            "bytes",
            (
                (total("slipstream_adapter_memory_bytes", EACH, MODEL), "LoRAs {{model}} {{instance}}"),
                (total("slipstream_prompt_cache_bytes", "instance"), "prompts {{instance}}"),
            ),
        ),
        Panel(
            "Out of memory",
            "Ticks that were halved and tried again, in five minutes.",
            "none",
            ((f"sum by (instance) (increase(slipstream_out_of_memory_total{{{INSTANCE}}}[5m]))", "{{instance}}"),),
        ),
        Panel(
            "Process",
            "Resident memory of the server, and of that the C library's heap: used, or kept free for the next use.",
            "bytes",
            (
                (f'process_resident_memory_bytes{{job=~"slipstream.*",{INSTANCE}}}', "{{instance}}"),
                (total("slipstream_heap_bytes", "state, instance"), "heap {{state}} {{instance}}"),
            ),
        ),
    ),
    "Jobs": (
        Panel(
            "Jobs by status",
            "Of the store; servers that share one show the same.",
            "none",
            ((f"max by (status) (slipstream_jobs{{{INSTANCE}}})", "{{status}}"),),
            stack=True,
        ),
        Panel(
            "Jobs recovered",
            "Taken up again that a server had left unfinished, in five minutes.",
            "none",
            ((f"sum by (instance) (increase(slipstream_jobs_recovered_total{{{INSTANCE}}}[5m]))", "{{instance}}"),),
        ),
        Panel(
            "Webhooks",
            "Tries by what came of them.",
            "ops",
            ((rate("slipstream_webhook_deliveries_total", "outcome", labels=INSTANCE), "{{outcome}}"),),
            stack=True,
        ),
    ),
    "GPU (needs NVIDIA's DCGM exporter)": (
        Panel(
            "GPU utilisation",
            "Part of the time in which something ran, of any process. Low while requests wait: the host is the brake.",
            "percent",
            ((gpu("DCGM_FI_DEV_GPU_UTIL"), GPU),),
        ),
        Panel("GPU power", "", "watt", ((gpu("DCGM_FI_DEV_POWER_USAGE"), GPU),)),
        Panel("GPU temperature", "", "celsius", ((gpu("DCGM_FI_DEV_GPU_TEMP"), GPU),)),
        Panel(
            "GPU memory, by DCGM",
            "Used by every process on the card, and free.",
            "mbytes",
            ((gpu("DCGM_FI_DEV_FB_USED"), f"used {GPU}"), (gpu("DCGM_FI_DEV_FB_FREE"), f"free {GPU}")),
            width=12,
        ),
        Panel(
            "XID errors",
            "The number of the last error that the driver reported, 0 for none; NVIDIA lists what each means.",
            "none",
            ((gpu("DCGM_FI_DEV_XID_ERRORS"), GPU),),
            width=12,
        ),
    ),
}


def variable(name: str, metric: str) -> dict[str, Any]:
    """A drop-down of a label's values, all chosen at first."""
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({metric}, {name})", "refId": name},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def panel(spec: Panel, number: int, x: int, y: int, height: int) -> dict[str, Any]:
    """A panel in Grafana's JSON."""
    custom = {"fillOpacity": 10, "stacking": {"mode": "normal" if spec.stack else "none"}}
    heatmap = {"options": {"calculate": False, "yAxis": {"unit": spec.unit}}} if spec.kind == "heatmap" else {}
    return {
        "id": number,
        "type": spec.kind,
        "title": spec.title,
        "description": spec.about,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": spec.width, "h": height},
        "fieldConfig": {
            "defaults": {"unit": spec.unit, "min": 0, **({"custom": custom} if spec.kind == "timeseries" else {})},
            "overrides": [],
        },
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": expr,
                "legendFormat": legend,
                **({"format": "heatmap"} if spec.kind == "heatmap" else {}),
            }
            for i, (expr, legend) in enumerate(spec.queries)
        ],
        **heatmap,
    }


def panels() -> list[dict[str, Any]]:
    """Every row and its panels, laid out from left to right."""
    out: list[dict[str, Any]] = []
    y = 0
    for title, specs in ROWS.items():
        out.append(
            {
                "id": len(out) + 1,
                "type": "row",
                "title": title,
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
                "panels": [],
            }
        )
        x, y, last = 0, y + 1, 0
        for spec in specs:
            if x + spec.width > 24:
                x, y = 0, y + last
            last = 4 if spec.kind == "stat" else 8
            out.append(panel(spec, len(out) + 1, x, y, last))
            x += spec.width
        y += last
    return out


def dashboard() -> dict[str, Any]:
    """The whole dashboard."""
    return {
        "uid": "slipstream",
        "title": "Slipstream",
        "tags": ["slipstream"],
        "schemaVersion": 41,
        "version": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [variable("model", "slipstream_model_weight_bytes"), variable("instance", "slipstream_ready")]
        },
        "panels": panels(),
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(dashboard(), indent=2) + "\n")
