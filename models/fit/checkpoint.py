"""Training state on disk without pickle: tensors as safetensors, numbers as JSON, replaced atomically."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer


def save(
    path: Path, module: nn.Module, ema: dict[str, Tensor], optimizers: Sequence[Optimizer], state: dict[str, Any]
) -> None:
    """Write one file holding weights, their moving average, the optimizers' tensors, and `state` in its header."""
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.items()}
    for index, optimizer in enumerate(optimizers):
        for slot, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{slot}.{name}": value for name, value in values.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(
        {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()},
        partial,
        {"state": json.dumps(state)},
    )
    os.replace(partial, path)


def load(path: Path, module: nn.Module, ema: dict[str, Tensor], optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Restore what `save` wrote, in place, and return its `state`."""
    tensors = load_file(path)
    module.load_state_dict(_below("module.", tensors))
    for name, value in _below("ema.", tensors).items():
        ema[name].copy_(value)
    for index, optimizer in enumerate(optimizers):
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in _below(f"optimizer.{index}.", tensors).items():
            slot, _, name = key.partition(".")
            slots.setdefault(int(slot), {})[name] = value
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return read_state(path)


def load_ema(path: Path, module: nn.Module) -> None:
    """Put a checkpoint's moving average into `module`."""
    module.load_state_dict(_below("ema.", load_file(path)))


def read_state(path: Path) -> dict[str, Any]:
    """The numbers of a checkpoint, without its tensors' data."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["state"])
        return state


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
