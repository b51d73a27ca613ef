"""One server with a transformer over text and image tokens and a U-Net: the `openai` client and the page on both."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from tests.e2e.playground import (
    chromium,
    free_port,
    launch,
    open_playground,
    start_server,
    stopped_at_the_end,
    wait_until_ready,
)

PROMPT = "a large red ring"


@pytest.fixture(scope="module")
def url(pipeline_dir: Callable[[str], Path]) -> Iterator[str]:
    port = free_port()
    server = start_server([str(pipeline_dir("flux-dev")), str(pipeline_dir("sd"))], port)
    with stopped_at_the_end(server):
        wait_until_ready(f"http://127.0.0.1:{port}", server)
        yield f"http://127.0.0.1:{port}"


def drawn(answer: openai.types.ImagesResponse) -> Image.Image:
    assert answer.data is not None
    return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or "")))


def test_the_openai_client_on_both(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        assert {one.id for one in client.models.list()} == {"flux-dev", "sd"}
        common = {"seed": 3, "num_inference_steps": 4}
        for model, mode in (("flux-dev", "taylorseer"), ("sd", "deepcache")):
            plain, cached = (
                drawn(
                    client.images.generate(
                        model=model, prompt=PROMPT, size="24x32", extra_body={**common, "acceleration": {"mode": one}}
                    )
                )
                for one in ("none", mode)
            )
            assert plain.size == cached.size == (24, 32)
            assert plain.tobytes() != cached.tobytes()
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.images.generate(model="flux-dev", prompt=PROMPT, extra_body={"scheduler": "ddim"})
        assert refused.value.param == "scheduler"


@pytest.mark.browser
@pytest.mark.skipif(chromium() is None, reason="no Chromium: apt-get install chromium")
def test_the_page_on_both(url: str) -> None:
    with sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        for model, mode in (("flux-dev", "first_block_cache"), ("sd", "deepcache")):
            page.goto("about:blank")
            open_playground(page, url, model=model, acceleration=mode, num_inference_steps=3, width=32, height=32)
            page.fill("#prompt", PROMPT)
            page.press("#prompt", "Control+Enter")
            expect(page.locator("#summary")).to_contain_text("One image in", timeout=30_000)
            assert page.eval_on_selector(".stage img", "image => image.naturalWidth") == 32
        assert errors == []
        browser.close()
