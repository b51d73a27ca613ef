"""The console script: what a user got wrong is said in a line."""

from __future__ import annotations

import pytest

from app.cli import main


@pytest.mark.parametrize(
    ("option", "said"),
    [("--acceleration=deepcache:interval=0", "interval"), ("--model=/nowhere/at/all", "/nowhere/at/all")],
)
def test_mistakes_are_a_line_not_a_traceback(
    option: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["slipstream", "generate", "a red ring", option])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("slipstream: ")
    assert said in printed
