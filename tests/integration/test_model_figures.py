"""MACs and usage to the unit: adapters, images, guidance, sizes and prompts, counted by hand."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.modules import module

from models import Backbone, Request, load, macs
from models.accelerators import CfgStudent, DeltaDiT, SelectiveGuidance
from models.adapters.lora import WEIGHT_NAME
from models.costs import counter as counting
from models.costs.counter import Counts, MacCounter
from models.costs.macs import Usage, usage
from models.resolve import resolve
from tests.integration.test_macs import CIFAR, DIT_XL, SD15
from tests.pipelines import save_adapter

TEXT_TOKENS = 120
STEPS = 2


def used(backbone: Backbone, **options: Any) -> Usage:
    request = Request(**{"prompt": "a ring", "num_inference_steps": STEPS, **options})
    return usage(backbone, resolve(backbone.spec, backbone.scheduler_config, request))


def added(file: Path, image_tokens: int) -> int:
    """What a row of PixArt pays for an adapter: tokens times rank times (in + out), for every pair in the file."""
    total = 0
    for key, weight in load_file(file / WEIGHT_NAME).items():
        tokens = TEXT_TOKENS if "attn2.to_k" in key or "attn2.to_v" in key else image_tokens
        total += tokens * weight.numel()
    return total


@pytest.fixture(scope="module")
def adapted(
    pipeline_dir: Callable[[str], Path], pipeline_of: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Backbone, dict[str, Path]]:
    """PixArt with students of other ranks, one on all blocks, one on the blocks 1 and 4 alone."""
    root, network = tmp_path_factory.mktemp("students"), pipeline_of("pixart-alpha").transformer
    files = {
        name: save_adapter(network, root / name, rank=rank, guidance_scale=3.0)
        for name, rank in (("two", 2), ("seven", 7), ("part", 5))
    }
    kept = {k: v for k, v in load_file(files["part"] / WEIGHT_NAME).items() if ".1." in k or ".4." in k}
    kept = {k: v for k, v in kept.items() if "blocks.1." in k or "blocks.4." in k}
    save_file(kept, files["part"] / WEIGHT_NAME, {"format": "pt", "guidance_scale": "3.0"})
    return load(str(pipeline_dir("pixart-alpha")), device="cpu", dtype="float32", adapters=files), files


def test_each_student_pays_for_its_own_matrices(adapted: tuple[Backbone, dict[str, Path]]) -> None:
    backbone, files = adapted
    for width, height in ((32, 32), (48, 32)):
        tokens = (width // 4) * (height // 4)
        plain = used(backbone, width=width, height=height, guidance_scale=1.0)
        for name in (*files, "two"):  # and the first once more, after the others
            found = used(backbone, width=width, height=height, acceleration=CfgStudent(adapter=name), num_images=3)
            assert found.macs == 3 * (plain.macs + STEPS * added(files[name], tokens)), name
            assert found.macs_unaccelerated == 3 * 2 * plain.macs
            assert (found.steps, found.rows) == (STEPS, 3 * STEPS)
    report = macs(backbone, num_inference_steps=3, acceleration=CfgStudent(adapter="seven"))
    assert report.steps == (report.row + added(files["seven"], 64),) * 3
    assert (report.image, report.image_unaccelerated) == (sum(report.steps), 6 * report.row)


def test_a_student_pays_only_in_the_blocks_that_run(adapted: tuple[Backbone, dict[str, Path]]) -> None:
    """The cached blocks are 0 to 2 of six: of the adapter on the blocks 1 and 4, one is left out."""
    backbone, files = adapted
    cache = DeltaDiT(interval=2, blocks=3, boundary=0)
    plain = macs(backbone, num_inference_steps=2, guidance_scale=1.0, acceleration=cache)
    for name, share in (("part", 2), ("seven", 2)):
        student = macs(backbone, num_inference_steps=2, acceleration=[CfgStudent(adapter=name), cache])
        extra = [a - b for a, b in zip(student.steps, plain.steps, strict=True)]
        assert extra == [added(files[name], 64), added(files[name], 64) // share]


def test_usage_is_by_images_steps_and_rows(adapted: tuple[Backbone, dict[str, Path]]) -> None:
    backbone, _ = adapted
    row = macs(backbone, num_inference_steps=1, guidance_scale=1.0).image
    assert used(backbone, num_images=3, guidance_scale=1.5) == Usage(2, 12, 12 * row, 12 * row, 2)
    assert used(backbone, num_images=3, guidance_scale=1.0) == Usage(2, 6, 6 * row, 6 * row, 2)
    half = SelectiveGuidance(stop=0.5)
    assert used(backbone, num_inference_steps=6, num_images=2, acceleration=half) == Usage(6, 18, 18 * row, 24 * row, 6)
    assert used(backbone, scheduler="heun", num_inference_steps=3) == Usage(5, 10, 10 * row, 10 * row, 5)


def test_a_given_prompt_is_counted_at_its_own_length(adapted: tuple[Backbone, dict[str, Path]]) -> None:
    """Each text token costs its projection, in every block a key and a value, and its part of attention."""
    backbone, _ = adapted
    config = backbone.network.module.config
    dim = config["attention_head_dim"] * config["num_attention_heads"]  # type: ignore[index]
    depth, text, tokens = backbone.spec.depth, int(config["cross_attention_dim"]), 64  # type: ignore[index]
    token = int(config["caption_channels"]) * dim + dim * dim + depth * (2 * text * dim + 2 * tokens * dim)  # type: ignore[index]
    embeds = torch.zeros(1, 7, 32)
    short = used(backbone, prompt=None, prompt_embeds=embeds, guidance_scale=1.0)
    usual = used(backbone, guidance_scale=1.0)
    assert usual.macs - short.macs == STEPS * (TEXT_TOKENS - 7) * token


def test_one_network_counts_all_sizes_and_old_counts_make_room(
    adapted: tuple[Backbone, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row takes two counts, of a block and of all around the blocks: two sizes fit."""
    backbone, made = replace(adapted[0]), list[str]()
    family = type(backbone.family)
    original = family.network

    def network(self: Any, module: Any) -> Any:
        made.append(type(module).__name__)
        return original(self, module)

    monkeypatch.setattr(family, "network", network)
    monkeypatch.setattr(counting, "MOST_COUNTS", 4)
    counted: list[tuple[int, ...]] = []
    count = Counts._count

    def watched(counts: Counts, forward: Any) -> int:
        counted.append(counts._size)
        return count(counts, forward)

    monkeypatch.setattr(Counts, "_count", watched)
    sizes = [(16, 32), (32, 16), (16, 32), (48, 32), (16, 32), (32, 16)]
    found = [used(backbone, width=w, height=h, guidance_scale=1.0).macs for w, h in sizes]
    assert found[0] == found[1] == found[2] == found[4] == found[5] < found[3]
    # The fourth takes the place of the second, which was used longer ago than the first, and is counted anew.
    assert counted == [(h // 2, w // 2) for w, h in (sizes[0], sizes[1], sizes[3], sizes[1]) for _ in range(2)]
    assert made == ["PixArtTransformer2DModel"]


def test_counts_on_many_threads_are_as_on_one(adapted: tuple[Backbone, dict[str, Path]]) -> None:
    """All begin before there is a network, at sizes, prompts and adapters of their own, twice each."""
    first, second = replace(adapted[0]), replace(adapted[0])
    asked: list[dict[str, Any]] = [
        {"width": width, "height": height, **more}
        for width, height in ((16, 24), (24, 8))
        for more in ({}, {"acceleration": CfgStudent(adapter="two")}, {"acceleration": CfgStudent(adapter="part")})
    ]
    expected = [used(first, **one) for one in asked]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: used(second, **one), asked * 2))
    assert found == expected * 2


def test_an_adapter_that_is_gone_is_not_kept_by_its_counts(
    pipeline_dir: Callable[[str], Path], pipeline_of: Callable[..., Any], tmp_path: Path
) -> None:
    student = save_adapter(pipeline_of("pixart-alpha").transformer, tmp_path / "gone", rank=2, guidance_scale=3.0)
    folder = str(pipeline_dir("pixart-alpha"))
    backbone = load(folder, device="cpu", dtype="float32", adapters={"gone": student})
    used(backbone, acceleration=CfgStudent(adapter="gone"))
    lora = weakref.ref(backbone.adapters.fetch(backbone.adapters["gone"]))
    backbone.adapters.forget("gone")
    gc.collect()
    assert lora() is None


def test_attentions_two_products_can_be_left_out(adapted: tuple[Backbone, dict[str, Path]]) -> None:
    backbone, _ = adapted
    dim, tokens = 32, 64
    whole, without = (macs(backbone, num_inference_steps=1, attention_matmuls=both).row for both in (True, False))
    assert whole - without == backbone.spec.depth * 2 * tokens * dim * (tokens + TEXT_TOKENS)


def test_bare_configs_have_the_known_parameters_and_defaults() -> None:
    assert MacCounter(SD15).parameters == 859_520_964  # Stable Diffusion 1.5's U-Net
    assert MacCounter(CIFAR).parameters == 35_746_307  # google/ddpm-cifar10-32
    small = {**DIT_XL, "num_layers": 2, "num_attention_heads": 2}
    plain = macs(small)
    assert len(plain.steps) == 50
    assert plain.steps == (2 * plain.row,) * 50  # guided where nothing is said
    assert plain.image == plain.image_unaccelerated == 100 * plain.row
    assert macs(small, width=256, height=256).row == plain.row  # 32 latent pixels of eight
    assert macs(small, guidance_scale=1.0, num_inference_steps=3).image == 3 * plain.row
    tiny = {**CIFAR, "block_out_channels": (32, 32, 32, 32)}
    assert macs(tiny, num_inference_steps=2).steps == (macs(tiny, width=32, height=32).row,) * 2


def test_a_transformer_is_counted_to_the_unit() -> None:
    """DiT of two blocks, by its layers: embedding, in each block its time, class, attention and MLP, and the head."""
    dim, tokens, depth = 144, 256, 2
    small = {**DIT_XL, "num_layers": depth, "num_attention_heads": 2}
    time = 256 * dim + dim * dim
    attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
    block = time + 6 * dim * dim + attention + 8 * tokens * dim * dim
    head = time + 2 * dim * dim + tokens * dim * (2 * 2 * 8)
    assert macs(small, num_inference_steps=1).row == tokens * dim * (4 * 2 * 2) + depth * block + head


def test_counting_puts_no_hook_on_the_forwards_of_other_threads() -> None:
    """Torch's own tracker of modules would see every thread's forwards, and count on their time."""
    tiny = {**DIT_XL, "num_layers": 1, "num_attention_heads": 1}
    ready, done, hooked = threading.Event(), threading.Event(), []

    def look() -> None:
        while not done.is_set():
            hooked.append(bool(module._has_any_global_hook()))  # type: ignore[no-untyped-call]
            ready.set()

    thread = threading.Thread(target=look)
    thread.start()
    ready.wait(20)
    try:
        alone = macs(tiny, num_inference_steps=1).row
    finally:
        done.set()
        thread.join()
    assert alone == macs(tiny, num_inference_steps=1).row
    assert not any(hooked)
