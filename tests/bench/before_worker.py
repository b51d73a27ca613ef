"""One process of `bench_before`, in either of the two checkouts: does what each line of standard input asks for.

It imports what both have, from the one that it is started for. A line is JSON, {"model", "dtype", "work", "do"}; so is
the answer. `time`: seconds of CPU time of one run; `count`: operators dispatched, and bytes that copying ones wrote;
`list`: the accelerations of a model; `look`: digests of one's final latents and pictures.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import Backbone, Request, generate, load
from models.accelerators import CfgStudent, DeepCache, DeltaDiT, DepthSkip, DiTFastAttn, SelectiveGuidance

PROMPT = "a large red circle above a small blue square on a white background"
STEPS = 25
COPIES = ("clone", "copy_", "_to_copy", "cat", "stack", "index_select", "index", "index_copy_", "index_put_")
ACCELERATIONS: dict[str, dict[str, Sequence[Any]]] = {
    "shapes-sd": {
        "none": (),
        "deepcache N=3": (DeepCache(interval=3),),
        "deepcache N=2 b=4": (DeepCache(interval=2, branch=4),),
        "deepcache nonuniform": (DeepCache(interval=4, schedule="nonuniform"),),
        "depth_skip 6": (DepthSkip(depth=6),),
        "selective_guidance": (SelectiveGuidance(start=0.2, stop=0.6),),
        "cfg_student": (CfgStudent(),),
        "deepcache + selective_guidance": (DeepCache(interval=3), SelectiveGuidance(stop=0.6)),
        "deepcache + cfg_student": (DeepCache(interval=2), CfgStudent()),
    },
    "shapes-dit": {
        "none": (),
        "delta_dit N=2": (DeltaDiT(interval=2),),
        "delta_dit N=3 rear": (DeltaDiT(interval=3, blocks=5, boundary=0),),
        "ditfastattn D2": (DiTFastAttn.model_validate({"plan": "D2"}),),
        "ditfastattn D6": (DiTFastAttn.model_validate({"plan": "D6"}),),
        "selective_guidance": (SelectiveGuidance(start=0.2, stop=0.6),),
        "cfg_student": (CfgStudent(),),
        "delta_dit + selective_guidance": (DeltaDiT(interval=2), SelectiveGuidance(stop=0.6)),
        "delta_dit + cfg_student": (DeltaDiT(interval=2), CfgStudent()),
    },
}
_numbers = count()


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators, and the bytes that those which copy have written."""

    operators = 0
    copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        if func.overloadpacket.__name__ in COPIES:
            self.copied += sum(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


def _one() -> list[Request]:
    return [Request(prompt=f"{PROMPT} {next(_numbers)}", seed=1, num_inference_steps=STEPS)]


def _mixed(name: str) -> list[Request]:
    """Sixteen clients with four accelerations, schedulers and numbers of steps."""
    cache_ = DeepCache(interval=3) if name == "shapes-sd" else DeltaDiT(interval=2)
    kinds = ((), (cache_,), (SelectiveGuidance(stop=0.6),), (CfgStudent(),))
    schedulers = ("ddim", "dpmpp_2m", "euler", "unipc")
    return [
        Request(
            prompt=PROMPT,
            seed=i,
            num_inference_steps=(10, 15, 20, 25)[i % 4],
            acceleration=kinds[i // 4],
            scheduler=schedulers[i % 4],
        )
        for i in range(16)
    ]


@cache
def _backbone(name: str, dtype: str) -> Backbone:
    return load(name, device="cpu", dtype=dtype)


def _work(name: str, dtype: str, work: str, keep: ExitStack) -> Callable[[], object]:
    backbone = _backbone(name, dtype)
    if work == "one request":
        return lambda: generate(backbone, _one())
    if work == "16 mixed":
        return lambda: generate(backbone, _mixed(name))
    if work == "diffusers":
        pipeline, scale = _pipeline(name, dtype), backbone.spec.default_guidance_scale
        return lambda: pipeline(
            f"{PROMPT} {next(_numbers)}", num_inference_steps=STEPS, guidance_scale=scale, **_plain(name)
        )
    from tests.bench.engine import engine
    from tests.bench.zoo import Model

    model = Model(name, Path("models/bundled") / name, backbone, bundled=True)
    served = keep.enter_context(engine(model))
    return lambda: served.draw(_one()[0])


def _pipeline(name: str, dtype: str) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(
        Path("models/bundled") / name, dtype=getattr(torch, dtype), local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _plain(name: str) -> dict[str, Any]:
    return {"clean_caption": False, "use_resolution_binning": False} if name == "shapes-dit" else {}


def _look(name: str, acceleration: str) -> list[str]:
    one = Request(
        prompt=PROMPT,
        seed=3,
        num_images=2,
        num_inference_steps=STEPS,
        acceleration=ACCELERATIONS[name][acceleration],
        scheduler="ddim",
    )
    result = generate(_backbone(name, "float32"), [one])[0]
    pixels = b"".join(image.tobytes() for image in result.images)
    return [hashlib.sha256(data).hexdigest() for data in (result.latents.contiguous().numpy().tobytes(), pixels)]


def _answer(asked: dict[str, str], known: dict[tuple[str, ...], Callable[[], object]], keep: ExitStack) -> object:
    name, dtype, work = asked["model"], asked["dtype"], asked["work"]
    if asked["do"] == "list":
        return list(ACCELERATIONS[name])
    if asked["do"] == "look":
        return _look(name, work)
    if (name, dtype, work) not in known:
        known[name, dtype, work] = _work(name, dtype, work, keep)
    run = known[name, dtype, work]
    if asked["do"] == "count":
        counting = Counting()  # type: ignore[no-untyped-call]
        with counting:
            run()
        return {"operators": counting.operators, "bytes copied": counting.copied}
    gc.collect()
    began = time.process_time()
    run()
    return time.process_time() - began


def main() -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)
    known: dict[tuple[str, ...], Callable[[], object]] = {}
    with ExitStack() as keep:
        for line in sys.stdin:
            print("answer", json.dumps(_answer(json.loads(line), known, keep)), flush=True)


if __name__ == "__main__":
    main()
