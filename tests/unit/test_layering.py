"""Who may import whom, read from the source: models know nothing of HTTP, batcher and accelerators no tensor."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODELS = sorted((ROOT / "models").rglob("*.py"))
APP = sorted((ROOT / "app").rglob("*.py"))
HTTP = {"fastapi", "starlette", "uvicorn", "sse_starlette", "prometheus_client", "typer", "asyncio"}
TENSORS = {"torch", "diffusers", "transformers", "peft", "safetensors", "numpy"}
PURE = [*sorted((ROOT / "models" / "accelerators").glob("*.py")), ROOT / "models/spec.py"]
PURE += [ROOT / f"models/reuse/{name}.py" for name in ("sites", "plans", "compile", "weights", "gates", "turns")]
PURE += [ROOT / "models/networks/sites.py"]
PURE += [ROOT / "models/errors.py", ROOT / "models/search/attention_plan.py"]
PURE += [ROOT / "models/profiles/profile.py", ROOT / "models/profiles/choice.py", ROOT / "models/profiles/__init__.py"]


def imports(file: Path) -> Iterator[str]:
    """Modules that a file imports at run time, with those inside functions, without those for type checkers alone."""
    yield from _imports(ast.parse(file.read_text()))


def _imports(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module or ""
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _imports(child)


def roots(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


@pytest.mark.parametrize("file", MODELS, ids=lambda file: str(file.relative_to(ROOT)))
def test_models_know_nothing_of_http(file: Path) -> None:
    assert not roots(file) & ({"app"} | HTTP)


@pytest.mark.parametrize("file", PURE, ids=lambda file: str(file.relative_to(ROOT)))
def test_accelerators_and_plans_touch_no_tensor(file: Path) -> None:
    """Nor do the modules of ours that they import."""
    assert not roots(file) & TENSORS
    pure = {"models.accelerators"} | {".".join(f.relative_to(ROOT).with_suffix("").parts) for f in PURE}
    ours = {name for name in imports(file) if name.split(".")[0] == "models"}
    assert all(name in pure or name.startswith("models.accelerators.") for name in ours)


def test_the_batcher_touches_no_tensor() -> None:
    file = ROOT / "app" / "engine" / "batcher.py"
    assert not roots(file) & (TENSORS | {"asyncio"})


def test_the_rules_see_what_they_forbid() -> None:
    assert "torch" in roots(ROOT / "models" / "denoise.py")
    assert "matplotlib" in roots(ROOT / "models" / "search" / "attention_plan.py")  # inside a function
    assert "models.backbone" not in set(imports(ROOT / "models" / "denoise.py"))  # for type checkers alone


def test_no_module_of_the_engine_forks_or_patches_diffusers() -> None:
    """Nothing is written onto a module after loading: no hooks, no attribute set on `module` in a forward."""
    for file in sorted((ROOT / "models" / "networks").glob("*.py")):
        names = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"register_forward_hook", "register_forward_pre_hook", "__class__", "item", "tolist", "cpu"}


def reaches(module: str, names: set[str], *, types: bool) -> set[str]:
    """The modules of `names` that a module imports, directly or through others; with `types` for type checkers too."""
    seen, todo = set[str](), [module]
    while todo:
        file = ROOT / Path(*todo.pop().split(".")).with_suffix(".py")
        file = file if file.is_file() else file.with_suffix("") / "__init__.py"
        found = every_import(file) if types else set(imports(file))
        todo += [name for name in found & names if name not in seen]
        seen |= found & names
    return seen


def every_import(file: Path) -> set[str]:
    return {n.module or "" for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)}


def test_what_a_request_is_leads_to_no_model() -> None:
    """The circle of old: backbone, conditioning, request, costs, backbone; for type checkers too."""
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in MODELS}
    of_request = reaches("models.request", names, types=True)
    assert "models.costs.usage" in of_request
    assert not of_request & {"models.backbone", "models.families", "models.costs.macs", "models.costs.counter"}
    of_families = reaches("models.families", names, types=True)
    assert {"models.families.sd", "models.request"} <= of_families
    assert not of_families & {"models.backbone", "models.loading", "models.costs.macs", "models.generate"}


def test_quality_is_given_its_judge_and_distilling_its_world() -> None:
    for folder in ("quality", "distill"):
        for file in sorted((ROOT / "models" / folder).glob("*.py")):
            assert not any(name.startswith("models.shapes") for name in every_import(file))
    assert "models.shapes.world" in every_import(ROOT / "models" / "training.py")
    assert "models.shapes.judge" in every_import(ROOT / "app" / "commands" / "evaluate.py")


def test_a_network_waits_for_its_device_in_one_place() -> None:
    """Where gates decide, all of a forward at once; nothing else asks for a number."""
    assert [file.name for file in MODELS if file.name != "device.py" and _calls(file, "download")] == ["gating.py"]
    assert _calls(ROOT / "models" / "networks" / "gating.py", "download") == 1


def _calls(file: Path, name: str) -> int:
    """How often a file calls a function of this name."""
    called = (node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
    return sum(isinstance(function, ast.Name) and function.id == name for function in called)


def test_the_store_is_imported_only_where_one_is_asked_for() -> None:
    """A server without a store loads nothing of it: outside `app.jobs` it is imported inside functions alone."""
    outside = [file for file in APP if "jobs" not in file.relative_to(ROOT / "app").parts[:1]]
    at_once = {file.name: [n for n in _at_import(file) if n.startswith(("app.jobs", "sqlalchemy"))] for file in outside}
    assert not any(at_once.values()), at_once
    assert "app.jobs.service" in set(imports(ROOT / "app" / "http" / "main.py")), "which makes it where it is asked for"


def _at_import(file: Path) -> list[str]:
    """What a file imports when it is imported itself."""
    found = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return [n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name for n in found]
