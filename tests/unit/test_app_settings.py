"""Settings: one definition for flag, variable, range and help; a bad value stops the start and says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
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
        (["--stepping", "fast"], ["--stepping", "batched"]),
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


DEFAULTS: dict[str, Any] = {
    "model": ("shapes-sd", "shapes-dit"),
    "adapter": (),
    "plan": (),
    "profile": (),
    "depth": (),
    "host": "127.0.0.1",
    "port": 8000,
    "device": "auto",
    "dtype": "auto",
    "stepping": "auto",
    "compile": False,
    "torch_threads": 0,
    "api_keys": (),
    "metrics_require_key": False,
    "cors_origins": (),
    "max_rows": "auto",
    "max_queue": 256,
    "max_feature_bytes": 4 * 1024**3,
    "decode_chunk": 4,
    "max_body_bytes": 24 * 1024**2,
    "max_pixels": "auto",
    "max_steps": 250,
    "max_images": 10,
    "max_prompt_length": 4000,
    "max_image_pixels": 16_777_216,
    "deadline_seconds": 600.0,
    "drain_seconds": 60.0,
    "log_format": "auto",
    "log_level": "info",
    "log_file": None,
}


def test_every_default() -> None:
    found = Settings().model_dump()
    assert DEFAULTS.items() <= found.items()


BOUNDS: list[tuple[str, list[Any], list[Any]]] = [
    ("port", [0, 65535], [-1, 65536]),
    ("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"], ["", "CPU", "cpu:0", "cuda:", "cuda:x", "xcuda", "mps"]),
    ("dtype", ["auto", "float32", "bfloat16", "float16"], ["float64", "", "half"]),
    ("stepping", ["auto", "exact", "batched"], ["", "fast"]),
    ("torch_threads", [0, 1024], [-1, 1025]),
    ("max_rows", [1, 4096, "auto", "8"], [0, 4097, "all"]),
    ("max_queue", [1, 100_000], [0, 100_001]),
    ("max_feature_bytes", [0, 2**50], [-1]),
    ("decode_chunk", [1, 64], [0, 65]),
    ("max_body_bytes", [1024, 2**40], [1023]),
    ("max_pixels", [64, "auto", 10**9], [63, "many"]),
    ("max_steps", [1, 1000], [0, 1001]),
    ("max_images", [1, 1000], [0, 1001]),
    ("max_prompt_length", [1, 10**6], [0]),
    ("max_image_pixels", [64, 2**40], [63]),
    ("deadline_seconds", [0.001, 86_400], [0, -1, 86_401]),
    ("drain_seconds", [0, 86_400], [-0.1, 86_401]),
    ("log_format", ["auto", "json", "human"], ["xml"]),
    ("log_level", ["debug", "info", "warning", "error"], ["trace", "INFO"]),
]


@pytest.mark.parametrize(("name", "allowed", "refused"), BOUNDS, ids=[bound[0] for bound in BOUNDS])
def test_every_bound_from_both_sides(
    name: str, allowed: list[Any], refused: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in allowed:
        monkeypatch.setenv(f"SLIPSTREAM_{name.upper()}", str(value))
        assert str(getattr(Settings(), name)) == str(getattr(Settings(**{name: value}), name))
        assert float(getattr(Settings(), name)) == float(value) if not isinstance(value, str) else True
    for value in refused:
        monkeypatch.setenv(f"SLIPSTREAM_{name.upper()}", str(value))
        with pytest.raises(ValidationError) as caught:
            Settings()
        assert {detail["loc"][0] for detail in caught.value.errors()} == {name}


@pytest.mark.parametrize(
    "options",
    [
        {"model": ()},
        {"adapter": ("shapes-sd",)},
        {"adapter": ("shapes-sd=",)},
        {"adapter": ("=x",)},
        {"plan": ("other=x.json",)},
        {"profile": ("other=x.json",)},
        {"depth": ("shapes-sd=-1",)},
        {"depth": ("other=1",)},
        {"depth": ("shapes-sd=",)},
        {"model": ("a/x", "x")},
    ],
    ids=str,
)
def test_values_that_belong_to_no_model(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        Settings(**options)


def test_repeated_values_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commas separate; blanks and empty parts are dropped."""
    monkeypatch.setenv("SLIPSTREAM_MODEL", " a ,, b,")
    monkeypatch.setenv("SLIPSTREAM_ADAPTER", "a=/x, b=/y")
    monkeypatch.setenv("SLIPSTREAM_PLAN", "b=/p.json")
    monkeypatch.setenv("SLIPSTREAM_PROFILE", "b=/q.json,a=/r.json")
    monkeypatch.setenv("SLIPSTREAM_DEPTH", "b=3")
    monkeypatch.setenv("SLIPSTREAM_CORS_ORIGINS", "http://one, http://two")
    settings = Settings()
    assert settings.model == ("a", "b")
    assert settings.adapter == ("a=/x", "b=/y")
    assert (settings.plan, settings.depth) == (("b=/p.json",), ("b=3",))
    assert settings.profile == ("b=/q.json", "a=/r.json")
    assert settings.cors_origins == ("http://one", "http://two")
    assert (settings.blocks("a"), settings.blocks("b")) == (None, 3)


def test_adapters_and_plans_are_kept_apart_and_named_by_their_paths() -> None:
    settings = Settings(
        model=("/x/sd", "org/dit"),
        adapter=("sd=/a/guidance-7.5", "dit=/b/two.safetensors", "sd=rel/one.safetensors"),
        plan=("dit=/p/D1.json", "dit=/p/v1.5.json", "dit=/p=q/D2.json"),
    )
    assert settings.files("adapter", "sd") == {
        "guidance-7.5": Path("/a/guidance-7.5"),
        "one": Path("rel/one.safetensors"),
    }
    assert settings.files("adapter", "dit") == {"two": Path("/b/two.safetensors")}
    assert settings.files("plan", "sd") == {}
    assert settings.files("plan", "dit") == {
        "D1": Path("/p/D1.json"),
        "v1.5": Path("/p/v1.5.json"),
        "D2": Path("/p=q/D2.json"),
    }


SAID: list[tuple[list[str], list[str]]] = [
    (["--port", "70000"], ["--port (SLIPSTREAM_PORT): ", "(allowed: 0 to 65535)"]),
    (["--max-prompt-length", "0"], ["--max-prompt-length (SLIPSTREAM_MAX_PROMPT_LENGTH): ", "(allowed: 1 or more)"]),
    (["--deadline-seconds", "0"], ["--deadline-seconds", "(allowed: above 0 to 86400"]),
    (["--max-rows", "0"], ["--max-rows (SLIPSTREAM_MAX_ROWS): ", "(allowed: 1 to 4096)"]),
    (["--plan", "nope=/x"], ["slipstream: plan: 'nope=/x' is not MODEL=PATH with MODEL one of shapes-dit, shapes-sd"]),
    (["--depth", "shapes-sd=x"], ["is not MODEL=BLOCKS with MODEL one of", ", and BLOCKS a number from 1"]),
]


@pytest.mark.parametrize(("flags", "words"), SAID, ids=[flags[0] for flags, _ in SAID])
def test_a_line_a_bad_setting(flags: list[str], words: list[str]) -> None:
    result = CliRunner().invoke(cli, ["serve", *flags])
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert all(line.startswith("slipstream: ") for line in lines)
    assert len(set(lines)) == len(lines)
    for word in words:
        assert word in result.stderr


def test_every_bad_setting_has_its_line() -> None:
    result = CliRunner().invoke(cli, ["serve", "--port", "-1", "--decode-chunk", "65"])
    assert len(result.stderr.splitlines()) == 2


@pytest.mark.parametrize("code", [0, 1])
def test_flags_go_before_the_environment_and_the_servers_code_is_the_commands(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Settings] = []

    def serve(settings: Settings) -> int:
        given.append(settings)
        return code

    monkeypatch.setattr("app.serve.serve", serve)
    monkeypatch.setenv("SLIPSTREAM_PORT", "1")
    monkeypatch.setenv("SLIPSTREAM_MAX_QUEUE", "7")
    monkeypatch.setenv("SLIPSTREAM_COMPILE", "true")
    flags = ["--port", "0", "--no-compile", "--model", "a", "--model", "b", "--metrics-require-key"]
    assert CliRunner().invoke(cli, ["serve", *flags]).exit_code == code
    [settings] = given
    assert (settings.port, settings.compile, settings.metrics_require_key) == (0, False, True)
    assert (settings.model, settings.max_queue) == (("a", "b"), 7)


def test_the_help_shows_defaults_and_choices() -> None:
    result = CliRunner().invoke(cli, ["serve", "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
    shown = " ".join(result.output.split())
    for text in ("Default shapes-sd shapes-dit.", "Default none.", "Default 8000.", "Default auto."):
        assert text in shown
    for text in ("auto|float32|bfloat16|float16", "debug|info|warning|error", "--compile", "--no-compile"):
        assert text in shown


@pytest.mark.parametrize(
    "value",
    ["collector:4318", "ftp://collector", "http://", "http://a:b@collector", "http://collector:99999", "http://c/?x=1"],
)
def test_a_collector_is_an_address(value: str) -> None:
    with pytest.raises(ValidationError, match=r"otlp_endpoint\n.*http"):
        Settings(otlp_endpoint=value)


def test_traces_say_that_they_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(otlp_endpoint="https://collector:4318/prefix").otlp_endpoint == "https://collector:4318/prefix"
    monkeypatch.setattr("app.settings.find_spec", lambda name: None)
    result = CliRunner().invoke(cli, ["serve", "--otlp-endpoint", "http://collector:4318"])
    assert result.exit_code == 2
    assert "--otlp-endpoint (SLIPSTREAM_OTLP_ENDPOINT): needs the extra: pip install" in result.output
