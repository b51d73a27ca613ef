"""The playground in Debian's Chromium, through a real server on small random weights: what a visitor does with it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

from models.loading import config_hash
from models.solvers.names import default_name
from tests.e2e.playground import (
    chromium,
    free_port,
    launch,
    open_playground,
    run,
    serious_violations,
    start_server,
    stopped_at_the_end,
    wait_until_ready,
    with_words,
)
from tests.unit.specs import profile

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium() is None, reason="no Chromium: apt-get install chromium"),
]

KEY = "open-sesame"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
PATIENCE = 20_000  # ms; for machines that have other things to do
expect.set_options(timeout=PATIENCE)
THREE = ["none", "deepcache:interval=2", "deepcache:interval=3+selective_guidance:stop=0.5"]


@pytest.fixture(scope="module")
def url(pipeline_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that asks for a key."""
    folder = with_words(pipeline_dir("sd"), tmp_path_factory.mktemp("playground") / "tiny-sd")
    measured(folder)
    model = str(folder)
    port = free_port()
    server = start_server(
        [model], port, SLIPSTREAM_API_KEYS=KEY, SLIPSTREAM_DATA_DIR=str(tmp_path_factory.mktemp("store"))
    )
    with stopped_at_the_end(server):
        wait_until_ready(f"http://127.0.0.1:{port}", server)
        yield f"http://127.0.0.1:{port}"


def measured(folder: Path) -> None:
    """Lay a profile beside a model: what would have been measured of it with eight steps."""
    network, noise = (json.loads((folder / part).read_text()) for part in ("unet/config.json", SCHEDULER_FILE))
    run = {"scheduler": default_name(noise), "num_inference_steps": 8, "width": 32, "height": 32}
    (folder / "profiles").mkdir()
    profile(config_hash=config_hash(network), **run).save(folder / "profiles" / "eight.json")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = launch(playwright)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("screenshots")


class Visit:
    """A page of its own, with what its console and its network said."""

    def __init__(self, context: BrowserContext) -> None:
        self.page: Page = context.new_page()
        self.errors: list[str] = []
        self.requested: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._asked)

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _asked(self, request: Request) -> None:
        self.requested.append(request.url)

    def forget_refusals(self, status: int) -> None:
        """Chromium itself logs every answer that is no success; the ones a test provokes are no errors of the page."""
        self.errors = [text for text in self.errors if f"responded with a status of {status}" not in text]


@contextmanager
def visiting(browser: Browser, url: str, key: str = "") -> Iterator[Visit]:
    """A visit with an empty cache; at its end nothing was logged as an error, nothing fetched from elsewhere."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    context.set_default_timeout(PATIENCE)
    if key:
        remember = f"sessionStorage.setItem('slipstream.key', '{key}')"
        context.add_init_script(f"if (location.protocol === 'http:') {remember}")
    visitor = Visit(context)
    yield visitor
    context.close()
    assert visitor.errors == []
    assert [address for address in visitor.requested if not address.startswith((url, "data:", "blob:"))] == []


@pytest.fixture
def visit(browser: Browser, url: str) -> Iterator[Visit]:
    """Somebody who has given the key before."""
    with visiting(browser, url, KEY) as visitor:
        yield visitor


@pytest.fixture
def stranger(browser: Browser, url: str) -> Iterator[Visit]:
    """Somebody who has not."""
    with visiting(browser, url) as visitor:
        yield visitor


def test_generates_an_image(visit: Visit, url: str, screenshots: Path) -> None:
    page = visit.page
    open_playground(page, url, acceleration="none")
    expect(page.locator("#run")).to_contain_text("Generate")
    page.fill("#prompt", "a small blue star on a black background")
    page.fill("#num_inference_steps", "5")
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#summary")).to_contain_text("One image in")
    assert page.eval_on_selector(".stage img", "image => image.naturalWidth") == 32
    expect(page.locator(".step")).to_have_text("seed 7 · 5 steps")
    page.screenshot(path=screenshots / "generate.png")


def test_past_pictures_come_back_with_their_settings(visit: Visit, url: str, screenshots: Path) -> None:
    """Of this browser, and of a job that somebody with the same key has submitted."""
    page = visit.page
    job = {"prompt": "a job of the night", "num_inference_steps": 3, "seed": 11, "acceleration": {"mode": "deepcache"}}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    submission = urllib.request.Request(f"{url}/v1/images/jobs", json.dumps(job).encode(), headers)
    with urllib.request.urlopen(submission) as answer:
        address = f"{url}/v1/images/jobs/{json.load(answer)['id']}"
    deadline = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < deadline:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
            if json.load(answer)["status"] == "completed":
                break
    open_playground(page, url, acceleration="none")
    page.fill("#prompt", "a small green ring")
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#summary")).to_contain_text("One image in")
    page.click("#view-history")
    expect(page.locator(".past")).to_have_count(2)
    for index in range(2):
        page.wait_for_function("i => document.querySelectorAll('.past img')[i].naturalWidth === 32", arg=index)
    assert serious_violations(page) == []
    page.screenshot(path=screenshots / "history.png")
    old = page.locator(".past", has_text="a job of the night")
    expect(old).to_contain_text("seed 11 · deepcache · job")
    for card in (old, page.locator(".past", has_text="a small green ring")):  # of the store, and of this browser
        card.get_by_role("button", name="Compare with now").click()
        expect(card.get_by_role("status")).to_have_text(
            re.compile(r"now: (the same|[5-9]\d(\.\d)? dB)"), timeout=PATIENCE
        )
        expect(card.locator("img")).to_have_count(2)
    old.get_by_role("button", name="Restore").click()
    expect(page.locator("#compare")).to_be_visible()
    expect(page.locator("#prompt")).to_have_value("a job of the night")
    expect(page.locator(".lane h2")).to_have_text("deepcache")
    page.click("#view-history")
    for left, text in ((1, "a job of the night"), (0, "a small green ring")):
        page.locator(".past", has_text=text).get_by_role("button", name="Delete").click()
        expect(page.locator(".past")).to_have_count(left)
    expect(page.locator("#pictures")).to_contain_text("No pictures yet")


def test_compares_three_accelerations_at_the_same_time(visit: Visit, url: str, screenshots: Path) -> None:
    page = visit.page
    open_playground(page, url, acceleration=THREE, num_inference_steps=40)
    page.click("#run")
    expect(page.locator(".lane[data-phase=running]")).to_have_count(3)
    page.screenshot(path=screenshots / "running.png")
    page.wait_for_selector("#run", state="visible", timeout=3 * PATIENCE)
    expect(page.locator("#summary")).to_contain_text("3 images together in")
    for lane in page.locator(".lane").all():
        expect(lane.locator(".facts")).to_contain_text("Time alone")
        expect(lane.locator(".facts")).to_contain_text("Speed-up")
    for lane in page.locator(".lane:not(.reference)").all():
        saved = lane.locator(".facts div", has_text="MACs saved").locator("dd").inner_text()
        assert 5 < int(saved.split()[0]) < 95
    assert tick_plans(url) > 1
    page.screenshot(path=screenshots / "compared.png", full_page=True)

    page.get_by_role("radio", name="Difference").check()
    expect(page.locator("canvas.difference:visible")).to_have_count(2)
    assert page.eval_on_selector_all("canvas.difference", "all => all.filter((one) => one.width === 32).length") == 2
    page.get_by_role("radio", name="Split").check()
    page.locator("#split-at").fill("30")
    expect(page.locator(".stage.is-split")).to_have_count(2)
    assert page.eval_on_selector("#lanes", "lanes => lanes.style.getPropertyValue('--split')") == "30%"
    page.screenshot(path=screenshots / "split.png", full_page=True)
    assert serious_violations(page) == []


def test_lets_the_server_choose_and_says_what_it_promised(visit: Visit, url: str, screenshots: Path) -> None:
    page = visit.page
    open_playground(page, url, acceleration=["none"], num_inference_steps=8)
    page.locator(".lane summary").click()
    menu = page.get_by_label("Accelerate with…")
    assert menu.locator("option").nth(1).inner_text() == "auto"  # the first choice
    menu.select_option("auto")
    page.get_by_label("prefer").select_option("speed")
    run(page)
    facts = page.locator(".facts")
    expect(facts).to_contain_text("unipc-3")
    expect(facts).to_contain_text("30.0 dB")
    expect(facts).to_contain_text("3.33× fewer MACs")
    expect(page.locator(".step")).to_have_text("seed 7 · 3 steps")
    page.screenshot(path=screenshots / "auto.png")
    page.fill("#num_inference_steps", "9")
    run(page)
    expect(facts).to_contain_text("measured for another run")
    assert serious_violations(page) == []


def test_cancels_in_the_middle(visit: Visit, url: str) -> None:
    page = visit.page
    # 499 evaluations: a quick machine is not done with them before the click.
    open_playground(page, url, acceleration=THREE, num_inference_steps=250, scheduler="heun")
    page.click("#run")
    expect(page.locator(".lane[data-phase=running]")).to_have_count(3)
    page.click("#cancel")
    expect(page.locator("#summary")).to_have_text("Cancelled")
    expect(page.locator(".lane[data-phase=cancelled]")).to_have_count(3)
    expect(page.locator(".step").first).to_contain_text("cancelled at step")
    wait_until_idle(url)
    page.fill("#num_inference_steps", "4")
    run(page)
    expect(page.locator(".lane[data-phase=done]")).to_have_count(3)


def test_says_beside_the_field_what_is_wrong(visit: Visit, url: str, screenshots: Path) -> None:
    page = visit.page
    open_playground(page, url, acceleration=["none", "deepcache"], num_inference_steps=4)
    interval = page.locator(".lane").nth(1).get_by_label("interval")
    page.locator(".lane").nth(1).locator("summary").click()
    interval.fill("0")
    run(page)
    beside = (interval.get_attribute("aria-describedby") or "").split()[0]
    expect(page.locator(f"#{beside}")).to_contain_text("greater than or equal to 1")
    expect(interval).to_have_attribute("aria-invalid", "true")
    expect(page.locator(".lane").nth(0)).to_have_attribute("data-phase", "done")

    page.fill("#num_inference_steps", "100000")
    run(page)
    expect(page.locator("#num_inference_steps-error")).not_to_be_empty()
    expect(page.locator("#num_inference_steps")).to_have_attribute("aria-describedby", "num_inference_steps-error")
    expect(page.locator(".step").first).to_have_text("not run")
    page.screenshot(path=screenshots / "bad-value.png")
    page.fill("#num_inference_steps", "4")
    expect(page.locator("#num_inference_steps-error")).to_be_empty()
    visit.forget_refusals(422)


def test_asks_for_a_key_and_refuses_a_wrong_one(stranger: Visit, url: str, screenshots: Path) -> None:
    page = stranger.page
    page.goto(url)
    expect(page.locator("#api-key")).to_be_focused()
    expect(page.locator("#prompt")).to_be_hidden()
    page.fill("#api-key", "guess")
    page.press("#api-key", "Enter")
    expect(page.locator("#api-key-error")).to_have_text("The server does not accept this key.")
    page.screenshot(path=screenshots / "wrong-key.png")
    assert serious_violations(page) == []
    page.fill("#api-key", KEY)
    page.press("#api-key", "Enter")
    page.wait_for_selector(".lane")
    expect(page.locator("#key-form")).to_be_hidden()
    page.fill("#num_inference_steps", "3")
    run(page)
    expect(page.locator(".lane[data-phase=done]")).to_have_count(3)
    stranger.forget_refusals(401)


def test_comes_back_from_the_link(visit: Visit, url: str) -> None:
    page = visit.page
    open_playground(page, url)
    page.click("#surprise")
    prompt = page.input_value("#prompt")
    assert prompt.startswith("a ")
    assert prompt.endswith(" background")
    page.fill("#guidance_scale", "2.5")
    page.fill("#seed", "11")
    page.select_option("#scheduler", "euler")
    page.locator(".adder button", has_text="selective_guidance").click()
    page.locator(".lane").last.get_by_label("stop").fill("0.4")
    page.locator(".lane").last.get_by_label("Compose with…").select_option("deepcache")
    page.locator(".lane").first.get_by_label("Remove this lane").click()
    names = page.locator(".lane h2").all_inner_texts()

    link = page.url
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector(".lane")
    assert page.locator(".lane h2").all_inner_texts() == names
    assert names[-1] == "selective_guidance + deepcache"
    assert page.input_value("#prompt") == prompt
    assert [page.input_value(f"#{name}") for name in ("guidance_scale", "seed", "scheduler")] == ["2.5", "11", "euler"]
    page.locator(".lane").last.locator("summary").click()
    expect(page.locator(".lane").last.get_by_label("stop")).to_have_value("0.4")
    assert page.url == link


def test_starts_from_a_picture(visit: Visit, url: str, tmp_path: Path) -> None:
    page = visit.page
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    open_playground(page, url, acceleration="none", num_inference_steps=4)
    expect(page.locator("#strength")).to_be_hidden()
    page.set_input_files("#image", tmp_path / "red.png")
    page.fill("#strength", "0.5")
    run(page)
    expect(page.locator(".step")).to_have_text("seed 7 · 2 steps")
    page.reload()
    expect(page.locator("#image-choose")).to_have_text("red.png")
    expect(page.locator("#strength")).to_have_value("0.5")


def test_copies_a_request_that_makes_the_same_image(visit: Visit, url: str, tmp_path: Path) -> None:
    page = visit.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_playground(page, url, acceleration="deepcache:interval=2", num_inference_steps=4)
    page.fill("#prompt", 'the artist\'s "red" circle')
    run(page)
    shown = picture(page.get_attribute(".stage img", "src") or "")
    page.get_by_role("button", name="Copy as…").click()
    copied = {}
    for kind in ("JSON", "curl", "Python"):
        page.get_by_role("radio", name=kind).check()
        page.click("#snippet-copy")
        expect(page.locator("#snippet-copy")).to_have_text("Copied")
        copied[kind] = page.evaluate("navigator.clipboard.readText()")
    assert serious_violations(page) == []
    assert json.loads(copied["JSON"])["acceleration"] == {"mode": "deepcache", "interval": 2}
    environment = os.environ | {"SLIPSTREAM_API_KEY": KEY}
    subprocess.run([sys.executable, "-c", copied["Python"]], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert same(shown, Image.open(tmp_path / "image.png"))
    if shutil.which("curl"):
        (tmp_path / "image.png").unlink()
        subprocess.run(copied["curl"], shell=True, cwd=tmp_path, env=environment, check=True, timeout=60)
        assert same(shown, Image.open(tmp_path / "image.png"))


def test_dark_and_light(visit: Visit, url: str, screenshots: Path) -> None:
    page = visit.page
    paper = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="dark")
    open_playground(page, url, acceleration=THREE, num_inference_steps=4)
    dark = page.evaluate(paper)
    run(page)
    page.screenshot(path=screenshots / "dark.png", full_page=True)
    assert serious_violations(page) == []
    page.click("#theme")
    assert page.evaluate(paper) != dark
    page.reload()
    page.wait_for_selector(".lane")
    assert page.evaluate(paper) != dark


def test_fits_a_phone(visit: Visit, url: str, screenshots: Path) -> None:
    page = visit.page
    page.set_viewport_size({"width": 390, "height": 844})
    open_playground(page, url, acceleration=THREE, num_inference_steps=4)
    run(page)
    for view in ("compare", "load"):
        page.click(f"#view-{view}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.screenshot(path=screenshots / f"phone-{view}.png", full_page=True)
    page.click("#view-compare")
    page.locator(".lane summary").last.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert serious_violations(page) == []


def test_draws_the_load(visit: Visit, url: str, screenshots: Path) -> None:
    page = visit.page
    open_playground(page, url, acceleration=THREE, num_inference_steps=4)
    run(page)
    page.click("#view-load")
    for text in ("running", "rows", "plans", "deepcache+selective_guidance", "Features kept between steps"):
        expect(page.locator("#load")).to_contain_text(text, ignore_case=True)
    expect(page.locator("#load tbody th", has_text="none")).to_be_visible()
    page.screenshot(path=screenshots / "load.png")
    assert serious_violations(page) == []
    assert "view=load" in page.url


def test_works_by_keyboard(visit: Visit, url: str) -> None:
    page = visit.page
    open_playground(page, url, acceleration="none", num_inference_steps=4)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    fields = {"prompt", "run", "model", "width", "height", "num_inference_steps", "guidance_scale", "seed", "scheduler"}
    assert fields | {"view-load", "theme", "Settings", "Copy as…"} <= seen


def tick_plans(url: str) -> float:
    """The mean number of plans in a tick so far."""
    return metric(url, "slipstream_tick_plans_sum") / metric(url, "slipstream_tick_plans_count")


def wait_until_idle(url: str) -> None:
    """Return once no request runs or waits; cancelled ones leave at the next tick, long before their own end."""
    until = time.monotonic() + 3
    while metric(url, "slipstream_requests_running") + metric(url, "slipstream_requests_waiting") > 0:
        assert time.monotonic() < until, "cancelled requests are still running"
        time.sleep(0.05)


def metric(url: str, name: str) -> float:
    """The sum of a metric's series, from the server's own page."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(rf"{name}[ {{]", line))


def picture(address: str) -> Image.Image:
    """The picture of a data: address."""
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def same(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures agree in every pixel."""
    return ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getbbox() is None
