"""The quick ones of the attacks, each against a server in a process of its own; `slipstream bench attack` runs all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.attack import ATTACKS, Arena, Attack
from tests.bench.bench_attack import MODULES

QUICK = [attack for attack in ATTACKS if attack.quick]


@pytest.mark.parametrize("attack", QUICK, ids=lambda attack: attack.run.__name__)
def test_it_holds(attack: Attack, pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    found = attack.run(Arena([str(pipeline_dir("sd"))], tmp_path))
    assert found.held, f"{attack.name}: {found.figure}, allowed: {found.limit}"


def test_every_attack_is_of_a_module_that_the_bench_runs() -> None:
    assert {attack.run.__module__ for attack in ATTACKS} <= {module.__name__ for module in MODULES}
    assert all(attack.run.__doc__ for attack in ATTACKS)
