"""Fidelity: metrics against known values, and the controls that stand beside every acceleration."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from models import Backbone
from models.accelerators import CfgStudent, DeepCache, SelectiveGuidance
from models.errors import WrongBackbone
from models.networks.sites import level
from models.quality import metrics
from models.quality.cases import ZerosInMemory, cases, cost, defaults
from models.reuse.plans import Zeros
from models.shapes import classifier
from models.shapes.judge import ShapesJudge
from models.shapes.pictures import to_tensor
from models.shapes.shapes import Scene, Thing, render, sample_scenes

SCENES = list(islice(sample_scenes(3, held_out=True), 64))
CAPTIONS = [scene.caption for scene in SCENES]
JUDGE = ShapesJudge()
PICTURES = [render(scene, random.Random(i)) for i, scene in enumerate(SCENES)]


def test_psnr_of_a_known_error() -> None:
    grey, darker = Image.new("RGB", (64, 64), (100, 100, 100)), Image.new("RGB", (64, 64), (90, 90, 90))
    assert metrics.psnr(grey, darker) == pytest.approx(28.1308, abs=1e-3)  # 10 log10(255² / 10²)
    assert metrics.psnr(grey, grey) == metrics.MOST_PSNR


def test_ssim_is_one_only_for_the_same_picture() -> None:
    assert metrics.ssim(PICTURES[0], PICTURES[0]) == pytest.approx(1.0)
    assert metrics.ssim(PICTURES[0], PICTURES[1]) < 0.95


def test_alignment_of_true_and_of_shuffled_captions() -> None:
    true, false = (JUDGE.alignment(PICTURES, c) for c in (CAPTIONS, CAPTIONS[1:] + CAPTIONS[:1]))
    assert true["all"] >= 0.98
    assert false["all"] <= 0.02


def test_the_judge_of_shapes_reads_its_own_world_only() -> None:
    assert JUDGE.reads(PICTURES, CAPTIONS)
    assert not JUDGE.reads(PICTURES[:1], ["an astronaut on a horse"])
    assert not JUDGE.reads([Image.new("RGB", (32, 32))], CAPTIONS[:1])
    assert not JUDGE.reads([], [])


def test_frechet_distance_of_known_gaussians() -> None:
    a = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert metrics.frechet(a, a) == pytest.approx(0.0, abs=1e-9)
    assert metrics.frechet(a + 2.0, a) == pytest.approx(12.0, rel=1e-6)  # |2, 2, 2|²
    assert metrics.frechet(a * 3.0, a) == pytest.approx(4.0 * float(a.var(0).sum() + a.mean(0).square().sum()))


def test_the_shipped_classifier_reads_scenes_it_never_saw() -> None:
    reader = classifier.load()
    answers = torch.stack([one.argmax(1) for one in reader(to_tensor(PICTURES))], dim=1)
    wanted = torch.tensor([classifier.targets(scene) for scene in SCENES])
    assert ((answers == wanted) | (wanted == classifier.UNASKED)).all(dim=1).float().mean() >= 0.95
    assert classifier.FILE.stat().st_size < 1_000_000


def test_features_tell_wrong_pictures_from_right_ones() -> None:
    reader = classifier.load()
    reference = classifier.features(reader, JUDGE.true_pictures(CAPTIONS, 512))
    true = metrics.frechet(classifier.features(reader, PICTURES), reference)
    blank = [Image.new("RGB", (64, 64), (245, 245, 245))] * 64
    assert true < 0.25 * metrics.frechet(classifier.features(reader, blank), reference)


def test_the_same_picture_has_the_same_answers_however_its_caption_puts_it() -> None:
    first, second = Thing("large", "red", "circle"), Thing("small", "blue", "star")
    assert classifier.targets(Scene("white", (first, second), "above")) == classifier.targets(
        Scene("white", (second, first), "below")
    )
    assert classifier.targets(Scene("white", (first,)))[-1] == classifier.UNASKED


def test_controls_cost_at_most_what_their_acceleration_costs(backbone_of: Callable[..., Backbone]) -> None:
    backbone = backbone_of("sd")
    chosen = cases(backbone, [[DeepCache(interval=3)], [SelectiveGuidance(stop=0.5)]], 10)
    spent = {case.label: cost(backbone, case).macs for case in chosen}
    step = spent["plain"] // 10
    controls = [case for case in chosen if case.kind == "same_macs"]
    assert [case.of for case in controls] == ["deepcache:interval=3", "selective_guidance:stop=0.5"]
    for case in controls:
        assert case.of is not None
        assert spent[case.label] <= spent[case.of] < spent[case.label] + step


def test_the_best_solver_stands_beside_every_acceleration(backbone_of: Callable[..., Backbone]) -> None:
    backbone = backbone_of("sd")
    for scheduler in ("ddim", "heun", None):
        chosen = cases(backbone, [[DeepCache(interval=3)]], 10, scheduler)
        same, best = (next(case for case in chosen if case.kind == kind) for kind in ("same_macs", "best_solver"))
        assert (same.scheduler, best.scheduler) == (scheduler or backbone.spec.default_scheduler, "unipc")
        assert {case.scheduler for case in chosen if case is not best} == {same.scheduler}
        budget = cost(backbone, chosen[1]).macs
        for case in (same, best):
            more = replace(case, num_inference_steps=case.num_inference_steps + 1)
            assert cost(backbone, case).macs <= budget < cost(backbone, more).macs
    chosen = cases(backbone, [[DeepCache(interval=3)]], 10, "unipc")
    assert not any(case.kind == "best_solver" for case in chosen)


def test_deepcache_has_its_negative_and_its_positive_control(backbone_of: Callable[..., Backbone]) -> None:
    chosen = cases(backbone_of("sd"), [[DeepCache(interval=3), SelectiveGuidance(stop=0.5)]], 10)
    zeros, full = (next(case for case in chosen if case.kind == kind) for kind in ("zeros", "full_steps"))
    assert isinstance(zeros.accelerators[0], ZerosInMemory)
    assert [zeros.accelerators[0].plan(step, 10).reuse for step in range(3)] == [{}, *[{level(0): Zeros()}] * 2]
    assert full.num_inference_steps == 4
    assert full.accelerators == (SelectiveGuidance(stop=0.5),)


def test_an_acceleration_that_does_not_fit_is_refused(backbone_of: Callable[..., Backbone]) -> None:
    with pytest.raises(WrongBackbone, match="unet"):
        cases(backbone_of("pixart-alpha"), [[DeepCache()]], 4)


def test_a_student_of_another_scale_stands_beside_its_teacher(student_of: Callable[..., Backbone]) -> None:
    backbone = student_of("sd")
    default = backbone.spec.default_guidance_scale
    assert default != 3.0
    chosen = cases(backbone, [[CfgStudent()], [CfgStudent(), DeepCache(interval=2)]], 4)
    others = {case.label: case for case in chosen if case.kind in ("unguided", "teacher")}
    assert [case.label for case in chosen if case.kind in ("unguided", "teacher")] == ["no guidance", "guided at 3"]
    assert {name: case.guidance_scale for name, case in others.items()} == {"no guidance": 1.0, "guided at 3": 3.0}
    backbone = replace(backbone, spec=replace(backbone.spec, default_guidance_scale=3.0))
    assert not any(case.kind == "teacher" for case in cases(backbone, [[CfgStudent()]], 4))


@pytest.mark.parametrize("layout", ["sd", "pixart-alpha"])
def test_the_default_accelerations_fit_their_model(backbone_of: Callable[..., Backbone], layout: str) -> None:
    backbone = backbone_of(layout)
    assert len(cases(backbone, defaults(backbone.spec), 6)) > 6
