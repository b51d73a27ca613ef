"""The figures of an evaluation: likeness and distance by their formulas, and each in its own column."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.accelerators import DeepCache
from models.quality import metrics, report
from models.quality.cases import Case
from models.quality.evaluate import Evaluation, Score
from models.quality.metrics import Likeness
from models.shapes.judge import ShapesJudge
from models.shapes.shapes import parse_caption, render

CAPTIONS = ["a large red circle on a white background", "a small blue star on a black background"]
PLAIN = Score(
    Case("plain", "baseline", 25, scheduler="ddim"),
    25, 50, 12_900_000_000, 1.0, 0.5, 1.0, None, Likeness(39.21, 0.5, 0.9912), None, None,
)  # fmt: skip
CACHED = Score(
    Case("deepcache:interval=2", "accelerated", 24, (DeepCache(interval=2),), scheduler="ddim"),
    24, 48, 7_456_000_000, 1.734, 0.25, 1.384, Likeness(46.12, 0.4, 0.9971), Likeness(38.04, 0.3, 0.9884),
    {"colours": 0.5, "all": 0.9219}, 97.004,
)  # fmt: skip
CONTROL = Score(
    Case("14 plain steps of unipc", "best_solver", 14, of="deepcache:interval=2", scheduler="unipc"),
    14, 28, 7_220_000_000, 1.786, 0.3, 1.428, Likeness(44.44, 0.6, 0.9012), Likeness(47.48, None, 0.9993),
    {"colours": 0.75, "all": 0.25}, 95.826,
)  # fmt: skip
SCORES = [PLAIN, CACHED, CONTROL]
COLOURS = ["red", "lime", "blue"]


@pytest.fixture(scope="module")
def judge() -> ShapesJudge:
    return ShapesJudge()


def evaluation() -> Evaluation:
    samples = [[Image.new("RGB", (64, 64), colour), Image.new("RGB", (96, 96), "yellow")] for colour in COLOURS]
    return Evaluation("shapes", 7, CAPTIONS, "cpu", "float32", "ddim", 200, SCORES, samples)


def test_every_figure_stands_in_its_column() -> None:
    head, _, *lines = report.table(evaluation()).splitlines()
    names = "run | steps | evaluations | GMACs | fewer MACs | wall | PSNR to plain | SSIM | PSNR to converged | SSIM"
    assert head == f"| {names} | alignment | Fréchet |"
    cached = "1.73x | 1.38x | 46.1 | 0.997 | 38.0 | 0.988 | 92.2% | 97.00 |"
    control = "1.79x | 1.43x | 44.4 | 0.901 | 47.5 | 0.999 | 25.0% | 95.83 |"
    assert lines == [
        "| plain | 25 | 25 | 12.9 | 1.00x | 1.00x | – | – | 39.2 | 0.991 | – | – |",
        f"| `deepcache:interval=2` | 24 | 24 | 7.46 | {cached}",
        f"| ↳ *14 plain steps of unipc* | 14 | 14 | 7.22 | {control}",
    ]


def test_json_has_every_figure_under_its_name() -> None:
    found = report.as_json(evaluation())
    runs = found.pop("runs")
    solver = {"scheduler": "ddim", "converged_steps": 200}
    assert found == {"model": "shapes", "pictures": 7, "device": "cpu", "dtype": "float32", **solver}
    for run, score in zip(runs, SCORES, strict=True):
        names = ("evaluations", "rows", "macs", "mac_ratio", "seconds", "speedup", "alignment", "frechet")
        assert {name: run[name] for name in names} == {name: getattr(score, name) for name in names}
        assert (run["label"], run["kind"], run["control_of"]) == (score.case.label, score.case.kind, score.case.of)
        assert run["num_inference_steps"] == score.case.num_inference_steps
        assert (run["guidance_scale"], run["scheduler"]) == (score.case.guidance_scale, score.case.scheduler)
    assert [run["to_plain"] for run in runs[:2]] == [None, {"psnr": 46.12, "psnr_error": 0.4, "ssim": 0.9971}]
    assert runs[2]["to_converged"] == {"psnr": 47.48, "psnr_error": None, "ssim": 0.9993}
    assert [[one["mode"] for one in run["acceleration"]] for run in runs] == [[], ["deepcache"], []]


def test_the_contact_sheet_has_a_run_a_row(tmp_path: Path) -> None:
    report.contact_sheet(evaluation(), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as opened:
        sheet = opened.convert("RGB")
    assert sheet.size == (250 + 2 * 66, 3 * 66)
    expected = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert [sheet.getpixel((250 + 32, 66 * row + 33)) for row in range(3)] == expected
    assert [sheet.getpixel((250 + 66 + 63, 66 * row + 64)) for row in range(3)] == [(255, 255, 0)] * 3


def noisy(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 12, 3), dtype=np.uint8))


def test_psnr_and_ssim_by_their_formulas() -> None:
    one, other = noisy(1), noisy(2)
    a, b = (np.asarray(picture, dtype=np.float64) for picture in (one, other))
    assert metrics.psnr(one, other) == pytest.approx(10 * np.log10(255**2 / ((a - b) ** 2).mean()))
    x, y = (np.lib.stride_tricks.sliding_window_view(t, (7, 7), axis=(0, 1)) for t in (a, b))
    axes, unbiased = (-2, -1), 49 / 48
    mx, my = x.mean(axes), y.mean(axes)
    vx, vy = x.var(axes) * unbiased, y.var(axes) * unbiased
    shared = ((x * y).mean(axes) - mx * my) * unbiased
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mx * my + c1) * (2 * shared + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert metrics.ssim(one, other) == pytest.approx(index.mean(), rel=1e-6)


def test_likeness_is_a_mean_with_its_standard_error() -> None:
    grey, darker, black = (Image.new("RGB", (8, 8), (level, level, level)) for level in (100, 90, 80))
    found = metrics.Likeness.of([grey, grey], [darker, black])
    apart = [metrics.psnr(grey, darker), metrics.psnr(grey, black)]
    assert found.psnr == pytest.approx(sum(apart) / 2)
    assert found.psnr_error == pytest.approx((apart[0] - apart[1]) / 2)  # |a - b| / √2 / √2
    assert metrics.Likeness.of([grey], [darker]).psnr_error is None


def test_likeness_is_never_more_than_a_hundred_decibels() -> None:
    one = Image.new("RGB", (64, 64), "black")
    assert metrics.psnr(one, one) == 100.0


def test_frechet_distance_of_gaussians_that_lean_differently() -> None:
    draw = torch.Generator().manual_seed(3)
    a, b = (torch.randn(2, 50, 4, generator=draw) @ torch.randn(2, 4, 4, generator=draw)).double()
    b = b + 2.0
    first, second = (np.cov(t.numpy(), rowvar=False) for t in (a, b))

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values.clip(min=0)) @ vectors.T  # type: ignore[no-any-return]

    crossed = root(root(first) @ second @ root(first))
    apart = float(((a.mean(0) - b.mean(0)) ** 2).sum())
    wanted = apart + np.trace(first) + np.trace(second) - 2 * np.trace(crossed)
    assert metrics.frechet(a, b) == pytest.approx(wanted)
    assert metrics.frechet(b, a) == pytest.approx(wanted)


def test_each_claim_has_its_share(judge: ShapesJudge) -> None:
    pictures = [render(parse_caption(CAPTIONS[0]), random.Random(i)) for i in range(4)]
    asked = [CAPTIONS[0], CAPTIONS[0].replace("red", "blue"), CAPTIONS[0].replace("white", "black"), CAPTIONS[0]]
    found = judge.alignment(pictures, asked)
    assert found == {"background": 0.75, "colours": 0.75, "shapes": 1.0, "sizes": 1.0, "relation": 1.0, "all": 0.5}


def test_the_reference_has_as_many_pictures_of_each_caption(judge: ShapesJudge) -> None:
    found = judge.true_pictures(CAPTIONS, 5)
    assert len(found) == 6
    for i, caption in enumerate(CAPTIONS):
        assert judge.alignment(found[i::2], [caption] * 3)["all"] == 1.0
    assert found[0].tobytes() != found[2].tobytes()
    assert [one.tobytes() for one in judge.true_pictures(CAPTIONS, 5)] == [one.tobytes() for one in found]
