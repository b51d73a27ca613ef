"""/v1/files and /v1/batches with the `openai` client, unchanged, over a real socket; on SQLite and on PostgreSQL."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

from app.http.main import create_app
from app.jobs.lines import fault, lines
from app.settings import Settings
from models import Backbone
from tests.postgres import postgres

Models = Callable[..., Backbone]
ENDPOINT: Literal["/v1/images/generations"] = "/v1/images/generations"


@contextmanager
def served(backbone: Backbone, **settings: Any) -> Iterator[tuple[openai.OpenAI, Any]]:
    """A server in this process, on a socket, and the client of it."""
    app = create_app(Settings(model=("sd",), torch_threads=1, max_rows=8, **settings), {"sd": backbone})
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not (server.started and app.state.engine.ready):
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            yield client, app
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The settings of a store."""
    if request.param == "sqlite":
        yield {"data_dir": tmp_path / "data"}
        return
    with postgres() as url:
        yield {"jobs_url": url}


def line(number: int, **body: Any) -> dict[str, Any]:
    asked = {"prompt": "a ring", "num_inference_steps": 2, "seed": number, "response_format": "b64_json"} | body
    return {"custom_id": f"line-{number}", "method": "POST", "url": ENDPOINT, "body": asked}


def upload(client: openai.OpenAI, *asked: Any) -> Any:
    data = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in asked).encode()
    return client.files.create(file=("in.jsonl", data), purpose="batch")


def start(client: openai.OpenAI, *asked: Any, **options: Any) -> Any:
    file = upload(client, *asked)
    return client.batches.create(
        input_file_id=file.id,
        endpoint=ENDPOINT,
        completion_window="24h",
        **options,
    )


def over(client: openai.OpenAI, batch_id: str) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.02)
    raise TimeoutError(batch)


def completed(client: openai.OpenAI, batch: Any) -> int:
    counts = client.batches.retrieve(batch.id).request_counts
    return counts.completed if counts is not None else 0


def read(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [json.loads(one) for one in client.files.content(file_id).text.splitlines()] if file_id else []


def test_a_batch_from_file_to_file(student_of: Models, store: dict[str, Any]) -> None:
    with served(student_of("sd"), **store) as (client, app):
        asked = [line(n, acceleration={"mode": "deepcache", "interval": 2}, n=1 + n % 2) for n in range(20)]
        wrong = [line(20, num_inference_steps=9999), line(21, size="31x31"), line(22, stream=True)]
        batch = start(client, *asked, *wrong, metadata={"night": "first"})
        assert (batch.object, batch.endpoint, batch.metadata) == ("batch", ENDPOINT, {"night": "first"})
        batch = over(client, batch.id)
        assert batch.status == "completed"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (23, 20, 3)
        assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at < batch.expires_at
        found = read(client, batch.output_file_id)
        assert [one["custom_id"] for one in found] == [f"line-{n}" for n in range(20)]
        answers = [one["response"]["body"] for one in found]
        assert [one["response"]["status_code"] for one in found] == [200] * 20
        assert [len(answer["data"]) for answer in answers] == [1 + n % 2 for n in range(20)]
        assert answers[3]["data"][1]["seed"] == 4
        live = client.images.generate(prompt="a ring", n=2, extra_body=asked[3]["body"] | {"n": 2})
        assert live.data is not None
        for index, image in enumerate(live.data):
            assert np.abs(pixels(answers[3]["data"][index]["b64_json"]) - pixels(image.b64_json)).max() <= 1
        assert live.usage is not None
        assert answers[3]["usage"].items() <= live.usage.to_dict().items()
        refused = {one["custom_id"]: one["response"] for one in read(client, batch.error_file_id)}
        assert {name: answer["status_code"] for name, answer in refused.items()} == {
            "line-20": 422,
            "line-21": 422,
            "line-22": 422,
        }
        assert refused["line-20"]["body"]["error"]["param"] == "num_inference_steps"
        assert [one.id for one in client.batches.list(limit=1)] == [batch.id]
        assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
        assert app.state.jobs.jobs.counts()["completed"] == 0, "its jobs are in its file now"


def pixels(b64_json: Any) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB")).astype(np.int16)


def test_edits_take_their_picture_in_the_line(student_of: Models, tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((40, 24)).save(out, "PNG")
    image = base64.b64encode(out.getvalue()).decode()
    edit = {**line(1, image=image, strength=0.5), "url": "/v1/images/edits"}
    without = {**line(2), "url": "/v1/images/edits"}
    with served(student_of("sd"), data_dir=tmp_path) as (client, _):
        file = upload(client, edit, without)
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/images/edits",
            completion_window="1h",  # type: ignore[arg-type]
        )
        batch = over(client, batch.id)
        assert [one["custom_id"] for one in read(client, batch.output_file_id)] == ["line-1"]
        [refused] = read(client, batch.error_file_id)
        assert refused["response"]["body"]["error"]["param"] == "image"


def test_files_are_kept_listed_and_deleted(student_of: Models, store: dict[str, Any]) -> None:
    with served(student_of("sd"), **store) as (client, app):
        made = [upload(client, line(n)) for n in range(3)]
        file = client.files.retrieve(made[0].id)
        assert (file.filename, file.purpose, file.status) == ("in.jsonl", "batch", "processed")
        assert file.bytes == len(json.dumps(line(0)))
        assert client.files.content(made[1].id).read() == json.dumps(line(1)).encode()
        assert [one.id for one in client.files.list(limit=2)] == [one.id for one in made[::-1]], "in pages"
        assert [one.id for one in client.files.list(order="asc")] == [one.id for one in made]
        assert client.files.delete(made[0].id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.content(made[0].id)
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            client.files.create(file=("x", b"x"), purpose="vision")
        assert caught.value.param == "purpose"
        expiring = client.files.create(
            file=("x", b"x"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert expiring.expires_at == expiring.created_at + 3600
        app.state.jobs.store.max_bytes = 100
        with pytest.raises(openai.InternalServerError) as full:
            client.files.create(file=("x", b"x" * 200), purpose="batch")
        assert full.value.status_code == 507


def test_a_batch_of_bad_lines_fails_and_says_which(student_of: Models, tmp_path: Path) -> None:
    with served(student_of("sd"), data_dir=tmp_path, max_batch_lines=6) as (client, _):
        elsewhere = {**line(3), "url": "/generate"}
        batch = over(client, start(client, line(1), "no json", line(1), elsewhere, {**line(4), "x": 1}).id)
        assert batch.status == "failed"
        assert [(one.line, str(one.message).split()[0]) for one in batch.errors.data] == [
            (2, "is"),
            (3, "custom_id"),
            (4, "method"),
            (5, "'x'"),
        ]
        assert batch.failed_at
        many = over(client, start(client, *[line(n) for n in range(7)]).id)
        assert [one.code for one in many.errors.data] == ["too_many_lines"]
        empty = over(client, start(client, "").id)
        assert [one.code for one in empty.errors.data] == ["empty_file"]
        with pytest.raises(openai.NotFoundError) as caught:
            client.batches.create(input_file_id="file-x", endpoint=ENDPOINT, completion_window="24h")
        assert caught.value.param == "input_file_id"
        with pytest.raises(openai.UnprocessableEntityError) as window:
            client.batches.create(input_file_id="file-x", endpoint=ENDPOINT, completion_window="1y")  # type: ignore[arg-type]
        assert window.value.param == "completion_window"


def test_cancelled_and_expired_batches_keep_what_is_done(student_of: Models, tmp_path: Path) -> None:
    with served(student_of("sd"), data_dir=tmp_path, jobs_in_flight=1) as (client, app):
        clock = app.state.jobs.store.clock
        for end in ("cancelled", "expired"):
            batch = start(client, *[line(n, num_inference_steps=40) for n in range(40)])
            deadline = time.monotonic() + 30
            while completed(client, batch) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            if end == "cancelled":
                assert client.batches.cancel(batch.id).status == "cancelling"
            else:
                app.state.jobs.store.clock = lambda: clock() + 25 * 3600
            batch = over(client, batch.id)
            assert batch.status == end
            counts = batch.request_counts
            assert 2 <= counts.completed < 40
            assert len(read(client, batch.output_file_id)) == counts.completed
            cut = read(client, batch.error_file_id)
            assert len(cut) == 40 - counts.completed
            assert cut[-1]["error"]["code"] == f"batch_{end}"
            assert len({one["custom_id"] for one in cut + read(client, batch.output_file_id)}) == 40
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(batch.id)


def test_a_batch_goes_on_in_the_next_process(student_of: Models, tmp_path: Path) -> None:
    with served(student_of("sd"), data_dir=tmp_path, jobs_in_flight=1) as (client, _):
        batch = start(client, *[line(n) for n in range(60)])
        while completed(client, batch) < 3:
            time.sleep(0.01)
    with served(student_of("sd"), data_dir=tmp_path) as (client, _):
        batch = over(client, batch.id)
        assert [one["custom_id"] for one in read(client, batch.output_file_id)] == [f"line-{n}" for n in range(60)]


def test_batches_and_files_of_a_key_are_its_own(student_of: Models, tmp_path: Path) -> None:
    with served(student_of("sd"), data_dir=tmp_path, api_keys="mine,yours") as (client, _):
        mine, yours = client.with_options(api_key="mine"), client.with_options(api_key="yours")
        batch = start(mine, line(1))
        for look in (
            lambda: yours.batches.retrieve(batch.id),
            lambda: yours.batches.cancel(batch.id),
            lambda: yours.files.content(batch.input_file_id),
            lambda: yours.batches.create(
                input_file_id=batch.input_file_id,
                endpoint=ENDPOINT,
                completion_window="24h",
            ),
        ):
            with pytest.raises(openai.NotFoundError):
                look()
        assert list(yours.batches.list()) == []
        assert list(yours.files.list()) == []
        assert over(mine, batch.id).status == "completed"


def test_a_file_may_be_larger_than_a_body(student_of: Models, tmp_path: Path) -> None:
    with served(student_of("sd"), data_dir=tmp_path, max_body_bytes=2048, max_file_bytes=10_000) as (client, _):
        assert client.files.create(file=("x", b"x" * 8000), purpose="batch").bytes == 8000
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=("x", b"x" * 20_000), purpose="batch")
        assert caught.value.status_code == 413
        with pytest.raises(openai.APIStatusError) as body:
            client.images.generate(prompt="x" * 4000)
        assert body.value.status_code == 413
        long = over(client, start(client, line(1, prompt="x" * 3000)).id)
        assert [one.code for one in long.errors.data] == ["line_too_long"]
        assert httpx.get(f"{client.base_url}files").status_code == 200


def test_lines_of_a_stream() -> None:
    text = b'{"a": 1}\n\n{"b": 2}\r\n{"c": 3}'
    for size in (1, 3, 100):
        chunks = [text[i : i + size] for i in range(0, len(text), size)]
        found = list(lines(chunks, 100))
        assert [json.loads(one) for _, one in found] == [{"a": 1}, {"b": 2}, {"c": 3}]
        assert text[found[1][0] :] == b'{"c": 3}'
    with pytest.raises(ValueError, match="too long"):
        list(lines([b"x" * 60, b"x" * 60], 100))


def test_what_is_wrong_with_a_line() -> None:
    seen: set[str] = set()
    assert fault(json.dumps(line(1)).encode(), ENDPOINT, seen) is None
    assert seen == {"line-1"}
    for bad in ("[]", '{"custom_id": "a"}', json.dumps({**line(2), "custom_id": ""})):
        assert fault(bad.encode(), ENDPOINT, seen)
    assert fault(b"[" * 5000, ENDPOINT, seen) == "is not JSON, or nested too deeply"
    for letter in ("\\ud800", "\\u0000"):
        bad = json.dumps({**line(3), "custom_id": "x"}).replace('"x"', f'"{letter}"')
        assert "custom_id" in str(fault(bad.encode(), ENDPOINT, seen))
    assert len(str(fault(json.dumps({**line(4), "y" * 10_000: 1}).encode(), ENDPOINT, seen))) < 300


def test_one_batch_does_not_stand_in_the_way_of_another(student_of: Models, tmp_path: Path) -> None:
    with served(student_of("sd"), data_dir=tmp_path) as (client, app):
        driver, broken = app.state.jobs.driver, threading.Event()
        advance = driver._advance
        first = start(client, line(1))

        async def sometimes(row: Any) -> None:
            if row["id"] == first.id:
                broken.set()
                raise LookupError("a bug")
            await advance(row)

        driver._advance = sometimes
        assert broken.wait(20)
        assert over(client, start(client, line(2)).id).status == "completed"
        driver._advance = advance
        assert over(client, first.id).status == "completed"


def test_a_batch_whose_input_is_deleted_keeps_what_is_done(
    student_of: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.jobs.driver.WINDOW", 16)
    with served(student_of("sd"), data_dir=tmp_path) as (client, app):
        runner = app.state.jobs.runner
        monkeypatch.setattr(type(runner), "room", property(lambda _: 0))
        batch = start(client, *[line(n, size="31x31") if n == 3 else line(n) for n in range(40)])
        while app.state.jobs.batches.get(batch.id, None)["line"] < 16:
            time.sleep(0.02)
        client.files.delete(batch.input_file_id)
        monkeypatch.undo()
        batch = over(client, batch.id)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert [wrong.code for wrong in batch.errors.data] == ["missing_file"]
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (40, 15, 1)
        done = [one["custom_id"] for one in read(client, batch.output_file_id)]
        assert done == [f"line-{n}" for n in range(16) if n != 3]
        assert [one["custom_id"] for one in read(client, batch.error_file_id)] == ["line-3"]
