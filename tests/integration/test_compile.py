"""`load(compile=True)`: the same results, and no graph made anew where rows or batch sizes differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from models import Backbone, Request, generate, load
from models.accelerators import Accelerator, DeepCache, DeltaDiT


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured and guarded as always, but run as they are: no C++ compiler, no half a minute."""
    compile_module = torch.nn.Module.compile

    def captured_only(module: torch.nn.Module, **options: Any) -> None:
        compile_module(module, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", captured_only)
    counters.clear()


@pytest.mark.usefixtures("eager_compiler")
@pytest.mark.parametrize(("layout", "accelerator"), [("pixart-alpha", DeltaDiT()), ("sd", DeepCache())])
def test_compiled_equals_plain(
    layout: str, accelerator: Accelerator, pipeline_dir: Callable[[str], Path], backbone_of: Callable[..., Backbone]
) -> None:
    compiled = load(str(pipeline_dir(layout)), device="cpu", dtype="float32", compile=True)
    requests = [Request(prompt="a red circle", num_inference_steps=3, seed=seed) for seed in range(2)]
    mixed = [*requests, Request(prompt="a red circle", num_inference_steps=3, acceleration=accelerator)]
    generate(compiled, requests)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for ours, plain in zip(generate(compiled, mixed), generate(backbone_of(layout), mixed), strict=True):
        torch.testing.assert_close(ours.latents, plain.latents, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == graphs
