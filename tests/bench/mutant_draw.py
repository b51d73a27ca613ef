"""Which mutations there are, which of them change behaviour, and which are drawn. `python -m tests.bench.mutants`"""

from __future__ import annotations

import ast
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

POPULATION = ("app/*.py", "models/*.py")
"""Globs over paths from the root of the checkout; * also matches /."""
LEFT_OUT = ("models/training*", "models/fit/*", "models/shapes/*", "models/distill/*", "models/bundled/*")
NO_BEHAVIOUR = {"override", "overload", "final"}
"""Decorators that only a type checker reads."""


@dataclass(frozen=True)
class Mutation:
    """The `occurrence`-th place in a file (from 0) where an operator of cosmic-ray applies."""

    path: str
    source: str
    """Digest of the file that it was counted in."""
    operator: str
    occurrence: int
    line: int
    last_line: int

    @property
    def key(self) -> str:
        """The same for the same mutation of the same text."""
        return f"{self.path}@{self.source}:{self.operator}:{self.occurrence}"


def digest(text: str) -> str:
    """Short, and another one for another text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def population(root: Path) -> dict[str, str]:
    """The text of every file that is mutated, by its path from the root."""
    paths = (str(file.relative_to(root)) for top in ("app", "models") for file in sorted((root / top).rglob("*.py")))
    chosen = [path for path in paths if _matches(path, POPULATION) and not _matches(path, LEFT_OUT)]
    return {path: (root / path).read_text() for path in chosen}


def _matches(path: str, globs: Sequence[str]) -> bool:
    return any(fnmatch(path, glob) for glob in globs)


def mutations(path: str, text: str) -> list[Mutation]:
    """Every mutation of a file by the operators of cosmic-ray that need no arguments."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    nodes, source, found = list(ast_nodes(get_ast(text))), digest(text), []
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if not operator.arguments():
            places = (place for node in nodes for place in operator().mutation_positions(node))
            found += [Mutation(path, source, name, n, first[0], last[0]) for n, (first, last) in enumerate(places)]
    return found


def mutated(text: str, mutation: Mutation) -> str:
    """The text of the file after the mutation."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    changed: str | None = mutate_code(text, get_operator(mutation.operator)(), mutation.occurrence)
    return text if changed is None else changed


def changes_behaviour(before: str, after: str) -> bool:
    """Whether Python still takes the text and would do something else with it."""
    try:
        return behaviour(before) != behaviour(after)
    except SyntaxError:
        return False


def behaviour(text: str) -> str:
    """What of a file is run: no docstrings, annotations, `__all__` or blocks for type checkers.

    Calls inside an annotation stay, as in `Annotated[int, Field(ge=1)]`: pydantic, FastAPI and typer read them.
    """
    return ast.dump(_Run().visit(ast.parse(text)))


class _Run(ast.NodeTransformer):
    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
            if not isinstance(node, ast.Module):
                node.decorator_list = [d for d in node.decorator_list if ast.unparse(d) not in NO_BEHAVIOUR]
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            return None
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and "__all__" in _targets(node):
            return None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = _calls(node.returns)
        if isinstance(node, ast.arg):
            node.annotation = _calls(node.annotation)
        if isinstance(node, ast.AnnAssign):
            node.annotation = _calls(node.annotation) or ast.Tuple([])
        return self.generic_visit(node)


def _targets(node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> list[str]:
    return [ast.unparse(target) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]


def _calls(annotation: ast.expr | None) -> ast.Tuple | None:
    if annotation is None:
        return None
    return ast.Tuple([node for node in ast.walk(annotation) if isinstance(node, ast.Call)])


def draw(
    lines: Mapping[str, int],
    seed: int,
    mutations_of: Callable[[str], Sequence[Mutation]],
    counts: Callable[[Mutation], bool],
) -> Iterator[Mutation]:
    """Mutations that count, in an order that the seed alone decides, until there are none.

    A file is drawn in proportion to its lines, then one of its mutations evenly, so that no file takes over the sample
    because much arithmetic is written in it. Who asks for more gets the same ones first.
    """
    files, decks, weights = random.Random(seed), dict[str, list[Mutation]](), dict(sorted(lines.items()))
    while weights:
        path = files.choices(list(weights), list(weights.values()))[0]
        if path not in decks:
            decks[path] = list(mutations_of(path))
            random.Random(f"{seed} {path}").shuffle(decks[path])
        while decks[path]:
            mutation = decks[path].pop()
            if counts(mutation):
                yield mutation
                break
        else:
            del weights[path]
