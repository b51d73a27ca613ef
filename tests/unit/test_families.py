"""Families as plain objects: what they refuse, how they guide, what they keep of prompts."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.conditioning import stack
from models.errors import MixedConditioning, ModelLoadError, OutOfRange, RequestError, WrongBackbone
from models.families import REGISTRY, of_network
from models.families.dit import DIT
from models.families.pixart import PIXART
from models.families.prompts import PromptCache
from models.families.sd import SD
from models.families.sdxl import SDXL
from models.families.text import check_alike
from models.families.unconditional import UNCONDITIONAL
from models.guidance import ClassifierFree, Guidance, Scales, Unguided
from models.request import Request
from models.resolve import resolve
from models.reuse.rows import Conditioning
from models.solvers.exact import mixture
from models.solvers.names import REGISTRY as SCHEDULERS
from models.solvers.names import noise_schedule
from tests.unit.specs import dit_spec, unet_spec

BUNDLED = Path(__file__).parents[2] / "models" / "bundled"
UNET: dict[str, Any] = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768}
CLASSES = {"_class_name": "DiTTransformer2DModel"}
XL: dict[str, Any] = UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("family", "config", "complaint"),
    [
        (SD, UNET | {"time_cond_proj_dim": 256}, "time_cond_proj_dim = 256"),
        (SD, UNET | {"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
        (SD, UNET | {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type = 'text_proj'"),
        (SD, UNET | {"encoder_hid_dim": 1024}, "encoder_hid_dim = 1024"),
        (SD, UNET | {"num_class_embeds": 1000}, "num_class_embeds = 1000"),
        (SD, UNET | {"attention_type": "gated"}, "attention_type = 'gated'"),
        (SD, UNET | {"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier'"),
        (SD, UNET | {"time_embedding_act_fn": "silu"}, "time_embedding_act_fn = 'silu'"),
        (SD, UNET | {"mid_block_type": None}, "mid_block_type = None"),
        (SD, UNET | {"dual_cross_attention": True}, "dual_cross_attention = True"),
        (SD, UNET | {"only_cross_attention": [False, True]}, r"only_cross_attention = \[False, True\]"),
        (SD, UNET | {"down_block_types": ["DownBlock2D", "KDownBlock2D"]}, "down_block_types"),
        (SD, UNET | {"a_key_of_next_year": 3}, "a_key_of_next_year = 3"),
        (SD, XL, "addition_embed_type = 'text_time'"),
        (SDXL, UNET, "addition_embed_type = None"),
        (SDXL, XL | {"time_cond_proj_dim": 256}, "time_cond_proj_dim = 256"),
        (SDXL, XL | {"addition_embed_type": "image"}, "addition_embed_type = 'image'"),
        (
            DIT,
            {"_class_name": "DiTTransformer2DModel", "norm_elementwise_affine": True},
            "norm_elementwise_affine = True",
        ),
        (PIXART, {"_class_name": "PixArtTransformer2DModel", "attention_type": "gated"}, "attention_type = 'gated'"),
        (PIXART, {"_class_name": "PixArtTransformer2DModel", "norm_type": "ada_norm"}, "norm_type = 'ada_norm'"),
    ],
)
def test_a_config_key_that_is_not_implemented_is_refused_by_name(
    family: Any, config: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ModelLoadError, match=rf"{family.part}/config\.json: {complaint}.* is not implemented"):
        family.check({"_class_name": family.pipelines[0]}, config)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        (SD, UNET),
        (SD, UNET | {"upcast_attention": True, "use_linear_projection": True, "attention_head_dim": [5, 10, 20, 20]}),
        (SD, UNET | {"class_embed_type": None, "time_cond_proj_dim": None, "a_key_of_next_year": None}),
        (SDXL, XL | {"transformer_layers_per_block": [1, 2, 10]}),
        (SD, json.loads((BUNDLED / "shapes-sd" / "unet" / "config.json").read_text())),
        (PIXART, json.loads((BUNDLED / "shapes-dit" / "transformer" / "config.json").read_text())),
    ],
)
def test_what_changes_nothing_is_not_refused(family: Any, config: dict[str, Any]) -> None:
    family.check({"_class_name": family.pipelines[0]}, config)


def test_a_pipelines_own_settings_are_held_against_it_too() -> None:
    """The refiner of Stable Diffusion XL loads as the same class, and takes another conditioning."""
    index = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "force_zeros_for_empty_prompt": False}
    SDXL.check(index, XL)
    with pytest.raises(ModelLoadError, match=r"model_index\.json: requires_aesthetics_score = True"):
        SDXL.check(index | {"requires_aesthetics_score": True}, XL)
    with pytest.raises(ModelLoadError, match="unet: DiTTransformer2DModel is not this family's UNet2DConditionModel"):
        SD.check({"_class_name": "StableDiffusionPipeline"}, {"_class_name": "DiTTransformer2DModel"})


def test_the_family_of_a_bare_network() -> None:
    assert of_network(UNET) is SD
    assert of_network(XL) is SDXL
    assert of_network({"_class_name": "UNet2DModel"}) is UNCONDITIONAL
    with pytest.raises(ModelLoadError, match="config: time_cond_proj_dim = 256 is not implemented"):
        of_network(UNET | {"time_cond_proj_dim": 256})


# Guidance


class Edit:
    """Three rows, as InstructPix2Pix guides."""

    roles = ("conditional", "picture", "unconditional")
    above = 1.0

    def weights(self, scales: Scales) -> dict[str, float]:
        s, i = scales.guidance, scales.image
        return {"conditional": s, "picture": i - s, "unconditional": 1 - i}

    def combine(self, predictions: Any, scales: Scales) -> Tensor:
        c, p, u = (predictions[role] for role in self.roles)
        return u + scales.guidance * (c - p) + scales.image * (p - u)  # type: ignore[no-any-return]


GUIDANCE: list[Guidance] = [ClassifierFree(), ClassifierFree(("conditional", "unconditional")), Unguided(), Edit()]


@pytest.mark.parametrize("guidance", GUIDANCE, ids=lambda guidance: "-".join(guidance.roles))
def test_the_weights_say_what_combine_does(guidance: Guidance) -> None:
    torch.manual_seed(0)
    scales = Scales(7.5, 1.6)
    predictions = {role: torch.randn(1, 4, 3, 5, dtype=torch.float64) for role in guidance.roles}
    weights = guidance.weights(scales)
    assert weights.keys() == predictions.keys()
    assert sum(weights.values()) == pytest.approx(1.0)
    weighted = torch.stack([weights[role] * one for role, one in predictions.items()]).sum(0)
    assert torch.allclose(weighted, guidance.combine(predictions, scales), rtol=0, atol=1e-12)


def test_a_conditional_prediction_alone_stands() -> None:
    alone = torch.randn(1, 4, 3, 5)
    assert ClassifierFree().combine({"conditional": alone}, Scales(7.5)) is alone


@pytest.mark.parametrize(
    ("roles", "rows"),
    [(("conditional",), 1), (("unconditional", "conditional"), 2), (("unconditional", "picture", "conditional"), 3)],
)
def test_a_guided_step_has_a_row_for_each_role(roles: tuple[str, ...], rows: int) -> None:
    run = resolve(unet_spec(roles=roles), {}, Request(prompt="", guidance_scale=3.0, num_inference_steps=2))
    assert [step.num_rows for step in run.steps] == [rows] * 2
    assert [len(list(step)) for step in run.steps] == [rows] * 2
    assert run.guided == (rows > 1)
    alone = resolve(unet_spec(roles=roles), {}, Request(prompt="", guidance_scale=1.0, num_inference_steps=2))
    assert [step.num_rows for step in alone.steps] == [1] * 2


# Conditioning


def test_what_only_some_rows_are_conditioned_on_is_an_error() -> None:
    text, mask = torch.zeros(1, 7, 32), torch.ones(1, 7)
    with pytest.raises(MixedConditioning, match="only some rows of this forward are conditioned on mask"):
        stack([{"text": text}, {"text": text, "mask": mask}])
    with pytest.raises(MixedConditioning, match="mask"):
        stack([{"text": text, "mask": mask}, {"text": text}])
    assert {k: tuple(v.shape) for k, v in stack([{"text": text}] * 3).items()} == {"text": (3, 7, 32)}


def test_guided_rows_of_unlike_conditioning_are_refused() -> None:
    row = {"text": torch.zeros(1, 7, 32)}
    check_alike(row, dict(row))
    with pytest.raises(OutOfRange, match=r"negative_prompt_embeds: its text are \(1, 8, 32\)"):
        check_alike(row, {"text": torch.zeros(1, 8, 32)})
    for one, other in ((row, {**row, "mask": torch.ones(1, 7)}), ({**row, "mask": torch.ones(1, 7)}, row)):
        with pytest.raises(RequestError, match="only one of the guided rows is conditioned on mask"):
            check_alike(one, other)


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        (SD.inputs, "class_label"),
        (SD.inputs, "prompt_attention_mask"),
        (SD.inputs, "pooled_prompt_embeds"),
        (SDXL.inputs, "negative_prompt_attention_mask"),
        (PIXART.inputs, "negative_pooled_prompt_embeds"),
        (DIT.inputs, "negative_prompt"),
        (DIT.inputs, "prompt_embeds"),
    ],
)
def test_a_field_without_a_meaning_for_the_family_is_refused(inputs: frozenset[str], field: str) -> None:
    value: Any = {"class_label": 3, "negative_prompt": "dull"}.get(field, torch.zeros(1, 7))
    with pytest.raises(WrongBackbone, match="does not take it") as caught:
        resolve(unet_spec(inputs=inputs), {}, Request(prompt="a ring", **{field: value}))
    assert caught.value.field == field


def test_what_a_family_takes_beside_its_prompts() -> None:
    embeds = {"prompt_embeds", "negative_prompt_embeds"}
    masks = {"prompt_attention_mask", "negative_prompt_attention_mask"}
    pooled = {"pooled_prompt_embeds", "negative_pooled_prompt_embeds"}
    takes = {
        name: set(one.inputs) & (embeds | masks | pooled) for name, one in {"a": SD, "b": SDXL, "c": PIXART}.items()
    }
    assert takes == {"a": embeds, "b": embeds | pooled, "c": embeds | masks}


def test_an_empty_negative_prompt_asks_for_nothing() -> None:
    spec = dit_spec(takes="class_label", inputs=DIT.inputs, num_classes=10, has_text_encoder=False)
    assert resolve(spec, {}, Request(prompt="", negative_prompt="", class_label=3)).guided


# Prompts


class Encoder:
    """Encodes a text as its length, 40 bytes each, and keeps what it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: list[str]) -> Conditioning:
        self.batches.append(texts)
        return {"text": torch.tensor([[float(len(text))] * 10 for text in texts])}


def test_prompts_that_are_not_kept_are_encoded_as_one_batch() -> None:
    cache, encoder = PromptCache(), Encoder()
    cache.encode(["a", "bb"], encoder)
    found = cache.encode(["ccc", "bb", "ccc", "dddd"], encoder)
    assert encoder.batches == [["a", "bb"], ["ccc", "dddd"]]
    assert [one["text"][0, 0].item() for one in found] == [3.0, 2.0, 3.0, 4.0]
    assert cache.nbytes == 4 * 40
    assert all(one["text"].untyped_storage().nbytes() == 40 for one in found)  # a view would hold its whole batch
    found[0].clear()
    assert cache.encode(["ccc"], encoder)[0]["text"].shape == (1, 10)


def test_prompts_are_encoded_one_by_one_where_they_must_not_depend_on_each_other() -> None:
    cache, encoder = PromptCache(alone=True), Encoder()
    cache.encode(["a"], encoder)
    found = cache.encode(["ccc", "a", "bb", "ccc"], encoder)
    assert encoder.batches == [["a"], ["ccc"], ["bb"]]
    assert [one["text"][0, 0].item() for one in found] == [3.0, 1.0, 2.0, 3.0]


def test_the_cache_is_bounded_in_bytes_and_forgets_what_was_asked_for_longest_ago() -> None:
    cache, encoder = PromptCache(max_bytes=100), Encoder()
    cache.encode(["a"], encoder)
    cache.encode(["bb"], encoder)
    cache.encode(["a"], encoder)
    cache.encode(["ccc"], encoder)
    assert cache.nbytes == 80
    encoder.batches.clear()
    cache.encode(["a"], encoder)
    cache.encode(["ccc"], encoder)
    assert encoder.batches == []
    assert cache.encode(["bb", "dddd", "eeeee"], encoder)[0]["text"][0, 0] == 2.0  # more than fit, all answered
    assert encoder.batches == [["bb", "dddd", "eeeee"]]
    assert cache.nbytes == 80
    cache.release()
    assert cache.nbytes == 0
    cache.encode(["eeeee"], encoder)
    assert encoder.batches[1:] == [["eeeee"]]


def test_a_prompt_larger_than_the_cache_is_answered_and_not_kept() -> None:
    cache, encoder = PromptCache(max_bytes=39), Encoder()
    assert cache.encode(["a"], encoder)[0]["text"].shape == (1, 10)
    assert cache.nbytes == 0


def test_threads_that_encode_the_same_count_its_bytes_once() -> None:
    cache, encoder, together = PromptCache(), Encoder(), threading.Barrier(4)

    def slow(texts: list[str]) -> Conditioning:
        together.wait(10)  # all four miss before any of them keeps
        return encoder(texts)

    threads = [threading.Thread(target=cache.encode, args=(["a"], slow)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(encoder.batches) == 4
    assert cache.nbytes == 40


# Starting from a picture


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_is_added_as_the_scheduler_does_it(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    schedule = noise_schedule(name, {"beta_schedule": "scaled_linear"}, 10, 0.6)
    clean, noise = torch.randn(1, 4, 3, 5, dtype=dtype), torch.randn(1, 4, 3, 5, dtype=dtype)
    first = schedule.timesteps[:1]
    signal, sigma = mixture(schedule.fresh(), first, dtype)
    assert signal.ndim == sigma.ndim == 0
    assert torch.equal(signal * clean + sigma * noise, schedule.fresh().add_noise(clean, noise, first))


def test_every_pipeline_class_has_one_family() -> None:
    assert len(REGISTRY) == sum(len(family.pipelines) for family in dict.fromkeys(REGISTRY.values()))
