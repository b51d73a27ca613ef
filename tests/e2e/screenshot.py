"""The README's picture of the playground, made again: `python -m tests.e2e.screenshot -o PICTURE`."""

from __future__ import annotations

import argparse
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.e2e.playground import (
    free_port,
    launch,
    open_playground,
    run,
    start_server,
    stopped_at_the_end,
    wait_until_ready,
)

LANES = ("none", "deepcache:interval=3", "{guidance}", "deepcache:interval=3+{guidance}")
GUIDANCE = ("cfg_student", "selective_guidance:stop=0.5")
"""What goes in for `{guidance}`: the student where the model has one, else the next best."""
VIEWPORT = (1440, 870)


def main() -> None:
    """Serve the model, run one comparison (the second run: the first one warms up) and take its picture."""
    arguments = _arguments()
    url = f"http://127.0.0.1:{(port := free_port())}"
    server = start_server([arguments.model], port)
    with stopped_at_the_end(server), sync_playwright() as playwright:
        wait_until_ready(url, server)
        browser = launch(playwright)
        width, height = VIEWPORT
        page = browser.new_page(
            viewport={"width": width, "height": height}, device_scale_factor=1.5, color_scheme=arguments.colours
        )
        open_playground(page, url, acceleration="none")
        guidance = GUIDANCE[0] if page.locator(".adder", has_text=GUIDANCE[0]).count() else GUIDANCE[1]
        lanes = [lane.format(guidance=guidance) for lane in arguments.acceleration or LANES]
        page.goto("about:blank")
        open_playground(page, url, acceleration=lanes, seed=arguments.seed)
        if arguments.prompt:
            page.fill("#prompt", arguments.prompt)
        for _ in range(2):
            run(page, timeout=300_000)
        if arguments.show != "picture":
            page.get_by_role("radio", name=arguments.show.capitalize()).check()
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.screenshot(path=arguments.output)
        browser.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default="shapes-sd")
    parser.add_argument("--prompt")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--acceleration", action="append", help="a lane, instead of the usual four")
    parser.add_argument("--show", choices=("picture", "difference", "split"), default="picture")
    parser.add_argument("--colours", choices=("light", "dark"), default="light")
    return parser.parse_args()


if __name__ == "__main__":
    main()
