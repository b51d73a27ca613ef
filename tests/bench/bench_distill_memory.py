"""Peak memory of distilling guidance at the size of Stable Diffusion 1.5: LoRA, a full copy, and plain inference.

    python -m tests.bench.bench_distill_memory [--measure] [--json FILE]

Counted: torch's memory tracker over tensors without storage, so that the full copy (24 GB) needs no such machine.
Measured: peak resident memory of a process that really takes the step, over that of one that only imported the same.
One image of 64x64 latents in float32, random weights, the text already encoded; the optimizer is AdamW after one step.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from models.distill.student import Pair
from models.families.sd import SD
from models.guidance import guided

CASES = ("inference", "lora", "copy")
NAMES = {"inference": "teacher's inference", "lora": "distilling a LoRA", "copy": "distilling a full copy"}
RANK = 4


def unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's U-Net, random weights."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().requires_grad_(False)


def work(case: str, network: Any, pair: Pair | None = None) -> list[Tensor]:
    """One step of the case. Returns what must stay alive to the end, the optimizer's state included."""
    x, t = torch.randn(1, 4, 64, 64), torch.tensor([500])
    text = {"encoder_hidden_states": torch.randn(1, 77, 768)}
    if case == "inference":
        with torch.no_grad():
            both = {name: value.repeat(2, 1, 1) for name, value in text.items()}
            return [SD.forward(network, x.repeat(2, 1, 1, 1), t.repeat(2), both)]
    if case == "lora":
        pair = pair or Pair(SD, network, 7.5, RANK)
        target, _ = pair.teacher(x, t, text, text)
        student, parameters = pair.student(x, t, text), pair.parameters
    else:
        trained = unet().requires_grad_(True)  # the teacher stays beside it
        trained.load_state_dict(network.state_dict())
        parameters = list(trained.parameters())
        with torch.no_grad():
            both = {name: value.repeat(2, 1, 1) for name, value in text.items()}
            free, wanted = SD.forward(network, x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            target = guided(wanted, free, 7.5)
        student = SD.forward(trained, x, t, text)
    optimizer = torch.optim.AdamW(parameters, foreach=False)
    F.mse_loss(student, target).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return [value for state in optimizer.state.values() for value in state.values()]


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all tensor storage that is alive, and the most there was."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._watch(value.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def counted(case: str) -> int:
    """Bytes of tensor storage at the peak."""
    with torch.device("meta"):
        network = unet()
        pair = Pair(SD, network, 7.5, RANK) if case == "lora" else None
    with FakeTensorMode(), Peak() as peak:
        for module in network.modules():
            for name, value in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(value.shape), requires_grad=value.requires_grad))
        work(case, network, pair)
    most: int = peak.most
    return most


def measured(case: str) -> int:
    """Bytes of resident memory at the peak of a process of its own, less what its imports take."""
    program = [sys.executable, "-m", "tests.bench.bench_distill_memory", "--child"]
    full, empty = (
        int(subprocess.run([*program, c], check=True, capture_output=True).stdout) for c in (case, "nothing")
    )
    return full - empty


def child(case: str) -> None:
    """Do the work and print this process's peak resident memory."""
    if case != "nothing":
        work(case, unet())
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    """Print a Markdown table; with --json write it to a file as well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", choices=[*CASES, "nothing"])
    parser.add_argument("--measure", nargs="*", choices=CASES, default=[], help="cases that this machine can hold")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.child is not None:
        return child(arguments.child)
    results = {case: {"counted": counted(case)} for case in CASES}
    for case in arguments.measure:
        results[case]["measured"] = measured(case)
    print("| | counted, GB | of inference | measured, GB |\n| --- | --: | --: | --: |")
    for case, result in results.items():
        share = result["counted"] / results["inference"]["counted"]
        seen = f"{result['measured'] / 1e9:.2f}" if "measured" in result else "–"
        print(f"| {NAMES[case]} | {result['counted'] / 1e9:.2f} | {share:.2f} | {seen} |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
