"""A family is named in its own file and nowhere else, read from the source: no branch on who it is outside."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.families import REGISTRY
from models.families.unconditional import UNCONDITIONAL

ROOT = Path(__file__).parents[2]
FAMILIES = dict.fromkeys([*REGISTRY.values(), UNCONDITIONAL])
NAMES = {name for family in FAMILIES for name in (family.name, family.network_class, *family.pipelines)}
NAMES |= {"sd2", "sd3", "flux", "pixart-alpha", "pixart-sigma", "sana", "lcm_unet"}
KINDS = {family.kind for family in FAMILIES}
"""What accelerators ask for, which two families are also called by."""

OWN = {"models/families/" + name for name in ("sd.py", "sdxl.py", "dit.py", "pixart.py", "unconditional.py")}
OWN |= {"models/families/" + name for name in ("sd3.py", "flux.py", "flux2.py", "z_image.py", "instruct_pix2pix.py")}
OWN |= {"models/families/unets.py"}  # the network that two of them share
OWN |= {"models/shapes/export.py", "models/shapes/networks.py"}  # which write models, of two families
OF_KINDS = {"models/spec.py", "models/search/attention_search.py"}
FILES = [
    file
    for folder in ("app", "models")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if str(file.relative_to(ROOT)) not in OWN
]


def named(source: str) -> Iterator[str]:
    """Every string that is no docstring, and every identifier."""
    tree = ast.parse(source)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_family_is_named_outside_its_file(file: Path) -> None:
    path = str(file.relative_to(ROOT))
    of_kinds = path in OF_KINDS or path.startswith(("models/accelerators/", "models/families/", "models/networks/"))
    forbidden = NAMES - KINDS if of_kinds else NAMES
    found = set(named(file.read_text()))
    assert found & forbidden == set()
    assert not any(word.endswith("Pipeline") and word != "DiffusionPipeline" for word in found)
    assert "layout" not in found or path in SHOWING


SHOWING = {
    "models/spec.py",  # where it is kept
    "models/loading.py",  # where it is filled in
    "models/costs/macs.py",
    "app/http/routes/info.py",  # where it is shown
    "app/http/schemas/responses.py",
    "models/quality/report.py",  # matplotlib's
    "models/search/attention_plan.py",
}


def test_the_search_sees_what_it_forbids() -> None:
    source = '"""sd is a word."""\nif spec.layout == "sd":\n    from diffusers import DiTPipeline\n'
    assert set(named(source)) == {"spec", "layout", "sd", "DiTPipeline"}
    assert {"sd", "sdxl", "pixart", "DiTPipeline", "PixArtTransformer2DModel"} <= NAMES
    assert {"StableDiffusionPipeline", "sd"} <= set(named((ROOT / "models/families/sd.py").read_text()))
