"""What can be loaded, in which types, and what is refused with a reason."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from app.engine.loading import load_all
from app.engine.pace import Pace
from app.metrics import Metrics
from app.settings import Settings
from models import Backbone, Plan, Request, generate, load
from models.accelerators import DeepCache, DepthSkip
from models.errors import ModelLoadError, OutOfRange, RequestError, WrongBackbone
from models.resolve import resolve
from models.reuse.rows import Conditioning
from models.solvers.names import REGISTRY
from tests.integration.test_mixed import distance
from tests.pipelines import save_adapter

Backbones = Callable[..., Backbone]
Directories = Callable[[str], Path]
EMBEDS = "encoder_hidden_states"


def request(layout: str, **options: Any) -> Request:
    content = {"class_label": 3} if layout == "dit" else {"prompt": "a red ring"}
    return Request(**{**content, "num_inference_steps": 2, "guidance_scale": 2.0, **options})


@torch.inference_mode()
def encoded(backbone: Backbone, *texts: str) -> list[Conditioning]:
    return backbone.family.encode(backbone.parts, texts)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def copied(pipeline_dir: Directories, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a layout's directory to damage."""
    return lambda layout: Path(shutil.copytree(pipeline_dir(layout), tmp_path / layout))


def test_a_directory_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no model_index\.json"):
        load(str(tmp_path))


def test_a_class_that_cannot_be_served(copied: Callable[[str], Path]) -> None:
    directory = copied("sd")
    edit(directory / "model_index.json", _class_name="KandinskyPipeline")
    with pytest.raises(ModelLoadError, match=r"KandinskyPipeline is not one of .*StableDiffusionPipeline"):
        load(str(directory))


def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="no bundled model, no directory"):
        load("nobody/no-such-model")


@pytest.mark.parametrize(("layout", "part"), [("sd", "unet"), ("dit", "transformer"), ("sd", "vae")])
def test_pickled_weights_are_refused(layout: str, part: str, copied: Callable[[str], Path]) -> None:
    """A .bin file beside a missing .safetensors file is never opened."""
    directory = copied(layout)
    weights = directory / part / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelLoadError, match="safetensors"):
        load(str(directory), device="cpu", dtype="float32")


def test_missing_weights(copied: Callable[[str], Path]) -> None:
    directory = copied("sd")
    (directory / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ModelLoadError):
        load(str(directory), device="cpu", dtype="float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layout", ["sd", "sdxl", "dit", "pixart-sigma"])
def test_types(layout: str, dtype: str, pipeline_dir: Directories, backbone_of: Backbones) -> None:
    """Half precision stays close to single precision, double closer still; latents are single at least."""
    backbone = load(str(pipeline_dir(layout)), device="cpu", dtype=dtype)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    [result] = generate(backbone, [request(layout, latents=latents)])
    [single] = generate(backbone_of(layout), [request(layout, latents=latents)])
    assert backbone.dtype == getattr(torch, dtype)
    assert result.latents.dtype == backbone.latent_dtype == (torch.float64 if dtype == "float64" else torch.float32)
    tolerance = {"float16": 0.02, "bfloat16": 0.1, "float64": 1e-4}[dtype]
    assert distance(result.latents.double(), single.latents.double()) <= tolerance


@pytest.mark.parametrize(
    ("layout", "depth"), [("sd", 1), ("sd", 2), ("sd", 4), ("sd", 6), ("sd2", 3), ("sdxl", 3), ("sdxl", 5)]
)
def test_depth_as_a_load_option_equals_depth_skip(
    layout: str, depth: int, pipeline_dir: Directories, backbone_of: Backbones
) -> None:
    """The same picture from a network whose dropped modules never reached memory."""
    small = load(str(pipeline_dir(layout)), device="cpu", dtype="float32", depth=depth)
    whole = backbone_of(layout)
    [short] = generate(small, [request(layout)])
    [skipped] = generate(whole, [request(layout, acceleration=DepthSkip(depth=depth))])
    assert torch.equal(short.latents, skipped.latents)
    assert small.spec.depth == depth
    assert small.weight_bytes() < whole.weight_bytes()
    assert short.usage.macs == skipped.usage.macs


def test_every_depth_loads_fewer_weights(pipeline_dir: Directories, backbone_of: Backbones) -> None:
    sizes = [
        load(str(pipeline_dir("sd")), device="cpu", dtype="float32", depth=depth).weight_bytes()
        for depth in range(1, 10)
    ]
    assert sizes == sorted(sizes)
    assert sizes[-1] < backbone_of("sd").weight_bytes()  # all levels, but no middle


def test_what_a_shallow_network_cannot_do(pipeline_dir: Directories) -> None:
    small = load(str(pipeline_dir("sd")), device="cpu", dtype="float32", depth=3)
    with pytest.raises(OutOfRange, match="branch"):
        generate(small, [request("sd", acceleration=DeepCache(branch=3))])
    with pytest.raises(ModelLoadError, match=r"0 is not in 1\.\.9"):
        load(str(pipeline_dir("sd")), device="cpu", dtype="float32", depth=0)
    with pytest.raises(ModelLoadError, match="only a U-Net"):
        load(str(pipeline_dir("dit")), device="cpu", dtype="float32", depth=2)


def test_without_a_text_encoder(copied: Callable[[str], Path], backbone_of: Backbones) -> None:
    directory = copied("sd")
    shutil.rmtree(directory / "text_encoder")
    shutil.rmtree(directory / "tokenizer")
    edit(directory / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    backbone = load(str(directory), device="cpu", dtype="float32")
    embeds, negative = torch.randn(2, 1, 7, 32)
    given: dict[str, Any] = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    [result] = generate(backbone, [request("sd", **given)])
    [expected] = generate(backbone_of("sd"), [request("sd", **given)])
    assert torch.equal(result.latents, expected.latents)
    with pytest.raises(WrongBackbone, match="without a text encoder"):
        generate(backbone, [request("sd")])
    with pytest.raises(WrongBackbone, match="negative_prompt_embeds: are needed for guidance"):
        generate(backbone, [request("sd", prompt=None, prompt_embeds=embeds)])


def test_extras_beside_a_model(copied: Callable[[str], Path]) -> None:
    """Defaults of the model's own, in slipstream.json."""
    directory = copied("sd")
    extras = {"default_num_inference_steps": 3, "default_guidance_scale": 2.0, "description": "small"}
    (directory / "slipstream.json").write_text(json.dumps(extras))
    spec = load(str(directory), device="cpu", dtype="float32").spec
    assert (spec.default_steps, spec.default_guidance_scale, spec.description) == (3, 2.0, "small")
    assert (spec.native_width, spec.native_height, spec.size_multiple) == (32, 32, 2)


def test_the_default_scheduler_is_the_one_it_came_with(copied: Callable[[str], Path]) -> None:
    directory = copied("sd")
    edit(directory / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    edit(directory / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler")
    backbone = load(str(directory), device="cpu", dtype="float32")
    assert backbone.spec.default_scheduler == "euler"
    [default], [euler] = (generate(backbone, [request("sd", scheduler=name)]) for name in (None, "euler"))
    assert torch.equal(default.latents, euler.latents)


@pytest.mark.parametrize(
    ("negative", "complaint"),
    [
        ({"negative_prompt_embeds": torch.zeros(1, 8, 32)}, "negative_prompt_embeds"),
        ({"negative_prompt": "dull"}, "negative_prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 7, 31)}, "prompt_embeds"),
        ({"prompt_embeds": torch.zeros(2, 7, 32)}, "prompt_embeds"),
    ],
)
def test_embeddings_that_fit_no_forward(negative: dict[str, Any], complaint: str, backbone_of: Backbones) -> None:
    """Refused before the first tick, so that they cannot fail the others in it."""
    embeds = {"prompt": None, "prompt_embeds": torch.zeros(1, 7, 32)}
    with pytest.raises(OutOfRange) as caught:
        generate(backbone_of("sd"), [request("sd", **{**embeds, **negative})])
    assert caught.value.field == complaint


def test_a_backbone_does_not_change(backbone_of: Backbones) -> None:
    """Nothing is written onto the network by a run."""
    backbone = backbone_of("sd")
    module = backbone.network.module
    state = {name: dict(vars(child)) for name, child in module.named_modules()}
    weights = [p._version for p in module.parameters()]
    generate(backbone, [request("sd", acceleration=DeepCache(interval=2))])
    assert {name: dict(vars(child)) for name, child in module.named_modules()} == state
    assert [p._version for p in module.parameters()] == weights


def test_a_server_may_load_a_model_in_part_without_its_students() -> None:
    settings = Settings(model=("shapes-sd",), depth=("shapes-sd=3",), device="cpu", max_rows=2)
    backbones, _ = load_all(settings, Metrics(), Pace())
    assert backbones["shapes-sd"].spec.depth == 3
    assert not backbones["shapes-sd"].adapters


FACTS: dict[str, dict[str, Any]] = {
    "sd": {"family": "unet", "layout": "sd", "depth": 9, "patch_size": 1, "default_guidance_scale": 7.5},
    "sd2": {"family": "unet", "layout": "sd", "depth": 4, "patch_size": 1, "default_guidance_scale": 7.5},
    "sdxl": {"family": "unet", "layout": "sdxl", "depth": 6, "patch_size": 1, "default_guidance_scale": 5.0},
    "dit": {"family": "dit", "layout": "dit", "depth": 6, "patch_size": 2, "default_guidance_scale": 4.0},
    "pixart-alpha": {"family": "dit", "layout": "pixart", "depth": 6, "patch_size": 2, "default_guidance_scale": 4.5},
    "pixart-sigma": {"family": "dit", "layout": "pixart", "depth": 6, "patch_size": 2, "default_guidance_scale": 4.5},
}


@pytest.mark.parametrize("layout", FACTS)
def test_what_a_model_says_of_itself(layout: str, backbone_of: Backbones) -> None:
    spec = backbone_of(layout).spec
    common = {
        "name": layout,
        "latent_channels": 4,
        "latent_scale": 2,
        "native_width": 32,
        "native_height": 32,
        "schedulers": tuple(REGISTRY),
        "default_scheduler": "ddim",
        "default_steps": 25,
        "num_train_timesteps": 1000,
        "num_classes": 1000 if layout == "dit" else None,
        "has_text_encoder": layout != "dit",
        "description": "",
        "examples": (),
        "prompt_grammar": None,
        "adapters": {},
        "plans": {},
    }
    wanted = common | FACTS[layout]
    assert {name: getattr(spec, name) for name in wanted} == wanted


def test_every_extra_beside_a_model(copied: Callable[[str], Path]) -> None:
    directory = copied("pixart-alpha")
    extras = {
        "native_width": 48,
        "native_height": 64,
        "default_scheduler": "dpmpp_2m",
        "examples": ["a ring", "a star"],
        "prompt_grammar": {"shapes": ["ring"]},
        "max_sequence_length": 24,
    }
    (directory / "slipstream.json").write_text(json.dumps(extras))
    backbone = load(str(directory), device="cpu", dtype="float32")
    spec = backbone.spec
    assert (spec.native_width, spec.native_height, spec.default_scheduler) == (48, 64, "dpmpp_2m")
    assert (spec.examples, spec.prompt_grammar) == (("a ring", "a star"), {"shapes": ["ring"]})
    assert (spec.description, spec.default_steps) == ("", 25)
    [found] = encoded(backbone, "a ring")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "encoder_hidden_states": (1, 24, 32),
        "encoder_attention_mask": (1, 24),
    }


@pytest.mark.parametrize(("layout", "tokens"), [("pixart-alpha", 120), ("pixart-sigma", 300), ("sd", None)])
def test_prompts_are_padded_to_the_familys_length(layout: str, tokens: int | None, backbone_of: Backbones) -> None:
    backbone = backbone_of(layout)
    [found] = encoded(backbone, "a ring")
    assert found[EMBEDS].shape[1] == backbone.parts.text_tokens
    assert tokens is None or backbone.parts.text_tokens == tokens


def test_native_sizes_may_be_unlike(copied: Callable[[str], Path]) -> None:
    """A list in the config is height before width."""
    directory = copied("sd")
    edit(directory / "unet" / "config.json", sample_size=[12, 20])
    spec = load(str(directory), device="cpu", dtype="float32").spec
    assert (spec.native_width, spec.native_height) == (40, 24)


@pytest.mark.parametrize(
    ("layout", "name"),
    [("sd", "StableDiffusionImg2ImgPipeline"), ("sdxl", "StableDiffusionXLImg2ImgPipeline")],
)
def test_image_to_image_pipelines_are_the_same_models(
    layout: str, name: str, copied: Callable[[str], Path], backbone_of: Backbones
) -> None:
    directory = copied(layout)
    edit(directory / "model_index.json", _class_name=name)
    same = load(str(directory), device="cpu", dtype="float32")
    [ours], [theirs] = (generate(b, [request(layout)]) for b in (same, backbone_of(layout)))
    assert torch.equal(ours.latents, theirs.latents)


def test_the_hash_is_of_the_architecture(copied: Callable[[str], Path], backbone_of: Backbones) -> None:
    """What starts with an underscore and the order of the keys say nothing of it; anything else does."""
    directory, known = copied("sd"), backbone_of("sd").spec.config_hash
    file = directory / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({"_name_or_path": "elsewhere", **dict(reversed(config.items()))} | {"_new": 1}))
    assert load(str(directory), device="cpu", dtype="float32").spec.config_hash == known
    assert len(known) == 16
    edit(file, sample_size=config["sample_size"] + 2)
    assert load(str(directory), device="cpu", dtype="float32").spec.config_hash != known


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "slipstream.json"])
def test_files_that_are_no_json_are_named(file: str, copied: Callable[[str], Path]) -> None:
    directory = copied("sd")
    (directory / file).write_text("{")
    with pytest.raises(ModelLoadError, match=rf"{file}: cannot be read"):
        load(str(directory), device="cpu", dtype="float32")


def test_a_missing_config_is_named(copied: Callable[[str], Path]) -> None:
    directory = copied("dit")
    (directory / "transformer" / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"transformer/config\.json: cannot be read"):
        load(str(directory), device="cpu", dtype="float32")


def test_weights_missing_from_a_part_are_counted(copied: Callable[[str], Path]) -> None:
    directory = copied("sd")
    weights = directory / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".elsewhere"))
    with pytest.raises(ModelLoadError, match=r"unet: \d+ weights are missing, conv_in\.bias first"):
        load(str(directory), device="cpu", dtype="float32", depth=2)


@pytest.mark.parametrize("depth", [0, 10, -1])
def test_depths_that_the_network_has_not(depth: int, pipeline_dir: Directories) -> None:
    with pytest.raises(ModelLoadError, match=rf"depth: {depth} is not in 1\.\.9"):
        load(str(pipeline_dir("sd")), device="cpu", depth=depth)


def test_a_part_of_a_network_is_of_the_type_asked_for(pipeline_dir: Directories) -> None:
    small = load(str(pipeline_dir("sd")), device="cpu", dtype="bfloat16", depth=2)
    assert {p.dtype for p in small.network.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("faster", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_auto_is_the_precision_that_is_faster(
    faster: bool, dtype: torch.dtype, pipeline_dir: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.device.fast_bfloat16", lambda _: faster)
    backbone = load(str(pipeline_dir("sd")), device="cpu")
    assert backbone.dtype == dtype
    assert backbone.device == torch.device("cpu")
    parameters = list(backbone.network.module.parameters())
    assert {p.dtype for p in parameters} == {dtype}
    assert not any(p.requires_grad for p in parameters)
    assert not backbone.network.module.training


@pytest.mark.parametrize(
    ("upcast", "dtype", "expected"), [(True, "float16", 32), (False, "float16", 16), (True, "bfloat16", 16)]
)
def test_a_vae_that_overflows_stays_in_single_precision(
    upcast: bool, dtype: str, expected: int, copied: Callable[[str], Path]
) -> None:
    directory = copied("sd")
    edit(directory / "vae" / "config.json", force_upcast=upcast)
    backbone = load(str(directory), device="cpu", dtype=dtype)
    assert torch.finfo(next(backbone.parts.vae.parameters()).dtype).bits == expected
    assert torch.finfo(next(backbone.network.module.parameters()).dtype).bits == 16


PLAN: dict[str, Any] = {
    "model": "any",
    "config_hash": "hash",
    "scheduler": "ddim",
    "num_inference_steps": 1,
    "tokens": 64,
    "guidance": True,
    "window": 8,
    "threshold": 0.1,
    "table": [["full"] * 6],
}


def test_what_lies_beside_a_model_is_found_and_what_is_given_goes_first(
    copied: Callable[[str], Path], pipeline_of: Callable[..., Any], tmp_path: Path
) -> None:
    directory, network = copied("pixart-alpha"), pipeline_of("pixart-alpha").transformer
    for name, scale in (("guidance-7.5", 7.5), ("soft", 2.0)):
        save_adapter(network, directory / "adapters" / name, guidance_scale=scale)
    other = save_adapter(network, tmp_path / "other", guidance_scale=3.0)
    (directory / "plans").mkdir()
    for name, window in (("D1", 1), ("D2", 2)):
        (directory / "plans" / f"{name}.json").write_text(json.dumps({**PLAN, "window": window}))
    (directory / "plans" / "notes.txt").write_text("no plan")
    (tmp_path / "given.json").write_text(json.dumps({**PLAN, "window": 5}))
    given = Plan.model_validate({**PLAN, "window": 6})
    backbone = load(
        str(directory),
        device="cpu",
        adapters={"soft": other, "more": other},
        plans={"D2": given, "D3": tmp_path / "given.json"},
    )
    assert {n: a.guidance_scale for n, a in backbone.spec.adapters.items()} == {
        "guidance-7.5": 7.5,
        "soft": 3.0,
        "more": 3.0,
    }
    assert {n: a.name for n, a in backbone.spec.adapters.items()} == {n: n for n in backbone.spec.adapters}
    assert {n: plan.window for n, plan in backbone.spec.plans.items()} == {"D1": 1, "D2": 6, "D3": 5}


def _cached(directory: Path, cache: Path, name: str) -> None:
    """Put a directory where the hub's client looks for what it has downloaded."""
    folder = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(directory, folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")


def test_a_hub_id_is_its_snapshot(
    pipeline_dir: Directories, backbone_of: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cached(pipeline_dir("sd"), tmp_path, "somebody/tiny-model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    backbone = load("somebody/tiny-model", device="cpu", dtype="float32")
    assert backbone.spec.name == "tiny-model"
    [ours], [theirs] = (generate(b, [request("sd")]) for b in (backbone, backbone_of("sd")))
    assert torch.equal(ours.latents, theirs.latents)


def test_nothing_that_could_run_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked for JSON, text, vocabularies and safetensors; neither pickles nor code."""
    asked: dict[str, list[str]] = {}

    def download(name: str, **patterns: list[str]) -> str:
        asked.update(patterns)
        raise OSError("no route to it")

    monkeypatch.setattr(sys.modules[load.__module__], "snapshot_download", download)
    with pytest.raises(ModelLoadError, match=r"somebody/x: no bundled model, no directory, and the hub says: no route"):
        load("somebody/x")
    weights = "diffusion_pytorch_model"
    wanted = [
        "model_index.json",
        f"unet/{weights}.safetensors",
        "tokenizer/merges.txt",
        "text_encoder/model.safetensors",
    ]
    wanted += [f"transformer/{weights}-00001-of-00002.safetensors", "tokenizer_2/spiece.model"]
    left = ["v1-5-pruned.safetensors", "v1-5-pruned.ckpt", f"unet/{weights}.bin", "pipeline.py", "unet/model.pkl"]
    left += [f"unet/{weights}.{variant}.safetensors" for variant in ("fp16", "non_ema")]
    left += ["safety_checker/model.safetensors"]
    assert list(filter_repo_objects([*wanted, *left], **asked)) == wanted


def test_a_directory_of_a_bundled_name_is_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shapes-sd").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load("shapes-sd", device="cpu").spec.depth > 0


def _texts(backbone: Backbone) -> list[int]:
    """How many texts each pass of the text encoder had; filled in as they happen."""
    batches: list[int] = []
    [encoder] = backbone.parts.encoders()
    encoder.register_forward_hook(lambda module, given, out: batches.append(len(out[0])))
    return batches


def test_prompts_are_encoded_once_and_as_one_batch(pipeline_dir: Directories) -> None:
    """No negative prompt is the empty one."""
    backbone = load(str(pipeline_dir("sd")), device="cpu", dtype="float32")
    batches = _texts(backbone)

    def prepared(**negatives: str | None) -> list[dict[str, Conditioning]]:
        asked = [request("sd", prompt=f"a {shape}", negative_prompt=text) for shape, text in negatives.items()]
        runs = [resolve(backbone.spec, backbone.scheduler_config, one) for one in [*asked, asked[0]]]
        backbone.prepare(runs)
        passes = list(batches)
        found = [backbone.conditioning(run) for run in runs]
        assert batches == passes
        return found

    ring, star, again = prepared(ring=None, star="")
    assert batches == [3]
    assert torch.equal(ring["conditional"][EMBEDS], again["conditional"][EMBEDS])
    assert torch.equal(ring["unconditional"][EMBEDS], star["unconditional"][EMBEDS])
    assert not torch.equal(ring["conditional"][EMBEDS], star["conditional"][EMBEDS])
    prepared(star="", cross="a ring")
    assert batches == [3, 1]
    for text, row in (("a ring", ring["conditional"]), ("a star", star["conditional"]), ("", star["unconditional"])):
        [alone] = encoded(load(str(pipeline_dir("sd")), device="cpu", dtype="float32"), text)
        assert torch.allclose(alone[EMBEDS], row[EMBEDS], atol=1e-6)


def test_what_an_encoded_prompt_holds_is_its_own(pipeline_dir: Directories) -> None:
    """Writing into a result's dict changes no later one, and a cached prompt keeps no batch alive."""
    backbone = load(str(pipeline_dir("sd")), device="cpu", dtype="float32")
    first, _ = encoded(backbone, "a ring", "a star")
    first["more"] = torch.zeros(1)
    assert set(encoded(backbone, "a ring")[0]) == {EMBEDS}
    assert first[EMBEDS].untyped_storage().nbytes() == first[EMBEDS].nbytes


def test_the_prompt_that_was_used_longest_ago_is_forgotten(pipeline_dir: Directories) -> None:
    backbone = load(str(pipeline_dir("sd")), device="cpu", dtype="float32")
    prompts = backbone.parts.prompts
    assert prompts.max_bytes == 256 * 2**20
    batches = _texts(backbone)
    encoded(backbone, "a")
    prompts.max_bytes = 2 * backbone.prompt_cache_bytes
    for text in ("b", "a", "c", "a", "c"):  # c pushes b out, not a, which was used since
        encoded(backbone, text)
    assert batches == [1, 1, 1]
    encoded(backbone, "b")
    assert batches == [1, 1, 1, 1]
    encoded(backbone, "c")
    assert len(batches) == 4
    encoded(backbone, "a")
    assert len(batches) == 5
    assert backbone.prompt_cache_bytes == prompts.max_bytes


def test_sdxl_needs_both_kinds_of_embeddings(backbone_of: Backbones) -> None:
    embeds = torch.zeros(1, 7, 64)
    with pytest.raises(RequestError, match="pooled_prompt_embeds: this model needs them"):
        generate(backbone_of("sdxl"), [request("sdxl", prompt=None, prompt_embeds=embeds)])


def test_sdxl_encodes_the_empty_prompt_where_its_config_says_so(
    copied: Callable[[str], Path], backbone_of: Backbones
) -> None:
    """`force_zeros_for_empty_prompt` off: no zeros; a negative prompt is encoded in either case."""
    directory = copied("sdxl")
    edit(directory / "model_index.json", force_zeros_for_empty_prompt=False)
    plain, zeros = load(str(directory), device="cpu", dtype="float32"), backbone_of("sdxl")

    def drawn(backbone: Backbone, negative: str | None) -> torch.Tensor:
        return generate(backbone, [request("sdxl", negative_prompt=negative)])[0].latents

    assert not torch.equal(drawn(plain, None), drawn(zeros, None))
    assert torch.equal(drawn(plain, None), drawn(plain, ""))
    assert torch.equal(drawn(zeros, None), drawn(zeros, ""))
    assert torch.equal(drawn(plain, "dull"), drawn(zeros, "dull"))
    assert not torch.equal(drawn(zeros, "dull"), drawn(zeros, None))


def test_without_a_mask_every_token_counts(backbone_of: Backbones) -> None:
    backbone, embeds = backbone_of("pixart-alpha"), torch.randn(1, 9, 32)
    options: dict[str, Any] = {"prompt": None, "prompt_embeds": embeds, "guidance_scale": 1.0}
    ones, part = torch.ones(1, 9), torch.tensor([[1.0] * 4 + [0.0] * 5])
    bare, whole, masked = (
        generate(backbone, [request("pixart-alpha", prompt_attention_mask=mask, **options)])[0].latents
        for mask in (None, ones, part)
    )
    assert torch.equal(bare, whole)
    assert not torch.equal(bare, masked)
