"""What a store costs: p50 of a 202, and of a live /generate with and without one, in turns. `slipstream bench jobs`"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import httpx

from tests.bench.harness import ROOT, Spread
from tests.drill import JOBS, OVER, PROMPT, Server, running
from tests.pipelines import save_pipeline


def main() -> None:
    """Two servers on a tiny model, one with a store: every round asks each for the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="A smoke run.")
    rounds = 3 if (asked := parser.parse_args()).quick else asked.rounds
    seconds: dict[str, list[float]] = {"live, no store": [], "live, store": [], "202": []}
    with tempfile.TemporaryDirectory(prefix="slipstream-jobs-") as folder:
        model = save_pipeline("sd", Path(folder))
        plain = Server({"model": model}, Path(folder) / "plain", forked=True)
        store = Server({"model": model, "data_dir": f"{folder}/data"}, Path(folder) / "store", forked=True)
        with running([plain, store]), httpx.Client(timeout=60) as http:
            for number in range(-3, rounds):
                body = {"prompt": PROMPT, "num_inference_steps": 3, "seed": number + 10}
                for name, url in (
                    ("live, no store", f"{plain.url}/generate"),
                    ("live, store", f"{store.url}/generate"),
                    ("202", f"{store.url}{JOBS}"),
                ):
                    began = time.perf_counter()
                    answer = http.post(url, json=body)
                    took = time.perf_counter() - began
                    answer.raise_for_status()
                    if number >= 0:
                        seconds[name].append(took)
                job = answer.json()["id"]
                while http.get(f"{store.url}{JOBS}/{job}").json()["status"] not in OVER:
                    time.sleep(0.01)
    pairs = zip(seconds["live, store"], seconds["live, no store"], strict=True)
    ratio = Spread.of([mine / theirs for mine, theirs in pairs])
    lines = [f"{name}: p50 {Spread.of(taken).times(1000)} ms" for name, taken in seconds.items()]
    text = "\n".join([*lines, f"live with a store over without, round by round: {ratio}"])
    print(text)
    target = ROOT / "runs" / "bench" / "jobs.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n")


if __name__ == "__main__":
    main()
