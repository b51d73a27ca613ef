"""Shared fixtures: the small pipelines, saved once a session, and their loaded backbones."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from models import Backbone, load
from tests.pipelines import save_adapter, save_pipeline

# Tiny networks gain nothing from a second thread, and on a busy machine two that wait for each other crawl.
os.environ["OMP_NUM_THREADS"] = "1"  # for servers in processes of their own
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a layout's small pipeline."""
    root = tmp_path_factory.mktemp("pipelines")

    def directory(layout: str) -> Path:
        return root / layout if (root / layout).is_dir() else save_pipeline(layout, root)

    return directory


@pytest.fixture(scope="session")
def backbone_of(pipeline_dir: Callable[[str], Path]) -> Callable[..., Backbone]:
    """The loaded backbone of a layout, shared by all tests: backbones are read-only."""
    loaded: dict[tuple[str, torch.dtype], Backbone] = {}

    def backbone(layout: str, dtype: torch.dtype = torch.float32) -> Backbone:
        if (layout, dtype) not in loaded:
            loaded[layout, dtype] = load(str(pipeline_dir(layout)), device="cpu", dtype=dtype)
        return loaded[layout, dtype]

    return backbone


@pytest.fixture(scope="session")
def batched_of(backbone_of: Callable[..., Backbone]) -> Callable[..., Backbone]:
    """The same backbone, whose trajectories follow their schedulers' tables."""
    return lambda layout, dtype=torch.float32: replace(backbone_of(layout, dtype), stepping="batched")


@pytest.fixture(scope="session")
def pipeline_of(pipeline_dir: Callable[[str], Path]) -> Callable[..., Any]:
    """The diffusers pipeline of a layout. Copy it before changing it: all tests share it."""
    loaded: dict[tuple[str, torch.dtype], Any] = {}

    def pipeline(layout: str, dtype: torch.dtype = torch.float32) -> Any:
        if (layout, dtype) not in loaded:
            pipe = DiffusionPipeline.from_pretrained(pipeline_dir(layout), dtype=dtype, local_files_only=True)
            pipe.set_progress_bar_config(disable=True)
            loaded[layout, dtype] = pipe
        return loaded[layout, dtype]

    return pipeline


@pytest.fixture(scope="session")
def student_of(
    pipeline_dir: Callable[[str], Path], pipeline_of: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Backbone]:
    """The backbone of a layout with a random guidance student of scale 3, named "student"."""
    root = tmp_path_factory.mktemp("adapters")
    loaded: dict[tuple[str, torch.dtype], Backbone] = {}

    def backbone(layout: str, dtype: torch.dtype = torch.float32) -> Backbone:
        if (layout, dtype) not in loaded:
            pipeline = pipeline_of(layout)
            network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
            adapter = save_adapter(network, root / layout, guidance_scale=3.0)
            directory = str(pipeline_dir(layout))
            loaded[layout, dtype] = load(directory, device="cpu", dtype=dtype, adapters={"student": adapter})
        return loaded[layout, dtype]

    return backbone
