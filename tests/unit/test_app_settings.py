"""Settings: one definition for flag, variable, range and help; a bad value stops the start and says why."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from app.cli import app as cli
from app.settings import Settings


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"SLIPSTREAM_{name.upper()}", raising=False)


def test_defaults_are_safe() -> None:
    settings = Settings()
    assert settings.host == "127.0.0.1"
    assert settings.model == ("shapes-sd", "shapes-dit")
    assert not settings.cors_origins
    assert not settings.api_keys


def test_variables_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_MODEL", "a, b")
    monkeypatch.setenv("SLIPSTREAM_API_KEYS", "first-key,second-key")
    monkeypatch.setenv("SLIPSTREAM_MAX_QUEUE", "7")
    monkeypatch.setenv("SLIPSTREAM_MAX_ROWS", "16")
    settings = Settings(max_queue=9)
    assert settings.model == ("a", "b")
    assert [key.get_secret_value() for key in settings.api_keys] == ["first-key", "second-key"]
    assert settings.max_queue == 9
    assert settings.max_rows == 16
    assert "first-key" not in repr(settings)


def test_files_are_by_model_and_name() -> None:
    settings = Settings(
        model=("/x/sd", "dit"), adapter=("sd=/a/student.safetensors", "dit=/b/c"), plan=("dit=/p/q.json",)
    )
    assert {k: str(v) for k, v in settings.files("adapter", "sd").items()} == {"student": "/a/student.safetensors"}
    assert list(settings.files("plan", "dit")) == ["q"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "70000"], ["--port", "SLIPSTREAM_PORT", "65535"]),
        (["--max-queue", "0"], ["--max-queue", "1 to 100000"]),
        (["--max-rows", "many"], ["--max-rows", "auto"]),
        (["--device", "tpu"], ["--device", "cuda"]),
        (["--dtype", "int4"], ["--dtype", "bfloat16"]),
        (["--adapter", "nope=/x"], ["adapter", "nope", "shapes-sd"]),
        (["--depth", "shapes-sd=x"], ["depth", "shapes-sd=x", "BLOCKS a number from 1"]),
        (["--depth", "shapes-sd=0"], ["depth", "BLOCKS a number from 1"]),
        (["--model", "a/x", "--model", "b/x"], ["model", "same name"]),
    ],
)
def test_a_bad_value_stops_the_start_with_name_and_range(flags: list[str], words: list[str]) -> None:
    result = CliRunner().invoke(cli, ["serve", *flags])
    assert result.exit_code == 2
    for word in words:
        assert word in result.output


def test_every_setting_is_a_flag_with_its_meaning() -> None:
    result = CliRunner().invoke(cli, ["serve", "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
    assert result.exit_code == 0
    for name, info in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in result.output
        assert info.description
        assert info.description.split(",")[0].split(";")[0][:40] in result.output
