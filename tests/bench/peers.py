"""What one would use instead: diffusers' pipelines, the DeepCache package, PyramidAttentionBroadcast and cache-dit."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Draw = Callable[..., Any]


def draw(pipeline: Any, prompt: str, steps: int, scale: float, seed: int = 0, output: str = "pil") -> Any:
    """One picture (or its latents) by a pipeline."""
    pixart = {"use_resolution_binning": False, "clean_caption": False} if hasattr(pipeline, "transformer") else {}
    return pipeline(
        **pixart,
        prompt=prompt,
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(seed),
        output_type=output,
    ).images


@contextmanager
def deepcache(pipeline: Any, interval: int, branch: int) -> Iterator[Any]:
    """The DeepCache package at work on a pipeline; yields its helper, in which its memory lies."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipeline)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield helper
    finally:
        helper.disable()


def deepcache_bytes(helper: Any) -> int:
    """Feature bytes that the package holds."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(helper.cached_output)}
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@contextmanager
def pyramid_broadcast(pipeline: Any, interval: int) -> Iterator[None]:
    """diffusers' PyramidAttentionBroadcast: self-attention is computed one step in `interval`."""
    from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
    from diffusers.hooks import HookRegistry

    network = pipeline.transformer
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(network, config)
    try:
        yield
    finally:
        for module in network.modules():
            if isinstance(registry := getattr(module, "_diffusers_hook", None), HookRegistry):
                registry.remove_hook("pyramid_attention_broadcast", recurse=False)


def reset_broadcast(pipeline: Any) -> None:
    """What a caller of PyramidAttentionBroadcast has to do between two pictures."""
    from diffusers.hooks import HookRegistry

    HookRegistry.check_if_exists_or_initialize(pipeline.transformer).reset_stateful_hooks()


def has_cache_dit() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("cache_dit") is not None


@contextmanager
def cache_dit(pipeline: Any, front: int, most: int) -> Iterator[None]:
    """cache-dit's DBCache, threshold wide open: `front` blocks always run, the others rest `most` steps in a row."""
    import cache_dit as package

    config = package.DBCacheConfig(
        Fn_compute_blocks=front,
        Bn_compute_blocks=0,
        residual_diff_threshold=1e9,
        max_warmup_steps=1,
        max_continuous_cached_steps=most,
    )
    package.enable_cache(pipeline, cache_config=config)
    try:
        yield
    finally:
        package.disable_cache(pipeline)
