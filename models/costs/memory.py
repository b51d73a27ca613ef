"""What a network takes of a device's memory, from its bare config: weights, activations of a row, features of an image.

The network's own code runs on tensors without storage; what lives at once is counted as they come and go. Attention is
taken to be a fused kernel, which holds nothing but its result.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.accelerators import REGISTRY, Accelerator
from models.costs.counter import WithoutAttention
from models.costs.macs import bare_scheduler, bare_spec
from models.errors import RequestError
from models.families import of_network
from models.networks.base import Network
from models.resolve import least_request, resolve
from models.reuse.plans import RowPlan
from models.reuse.rows import Row
from models.reuse.store import FeatureStore

DTYPE = torch.bfloat16
OF_A_PROFILE: Mapping[str, Mapping[str, Any]] = {
    "teacache": {"coefficients": (1.0, 0.0)},
    "magcache": {"ratios": (1.0,)},
}
"""In place of what is fitted to a model: how much is remembered does not depend on it."""
GIB = 2**30
BUNDLED = Path(__file__).parents[1] / "bundled"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, in bfloat16, with latents and predictions in float32. `features`: the most that an image remembers under
    each accelerator as it is by default. Text encoders and VAE come on top."""

    parameters: int
    """With the tables of positions that lie among them."""
    weights: int
    activations: int
    """What each row of a forward adds."""
    base: int
    """What a forward takes whatever its rows."""
    features: Mapping[str, int]
    rows_an_image: int

    def rows(self, capacity: int, features: int = 0) -> int:
        """How many rows fit in so many bytes, with what their images remember."""
        left = capacity - self.weights - self.base
        return max(0, int(left // (self.activations + features / self.rows_an_image)))


def known_configs() -> dict[str, Path]:
    """Configs of networks that are often asked for, by name; no weights."""
    return {file.stem: file for file in sorted((BUNDLED / "configs").glob("*.json"))}


def memory_plan(
    config: Mapping[str, Any], width: int | None = None, height: int | None = None, num_steps: int | None = None
) -> MemoryPlan:
    """The plan of a bare diffusers config at a size in pixels, the native one where none is given.

    Raises `ModelLoadError` for a config that no family implements, and `OutOfRange` for a size that it cannot do.
    """
    family = of_network(config)
    with torch.device("meta"):
        module = getattr(diffusers, family.network_class).from_config(config).eval()
    nn.Module.to(module, dtype=DTYPE)  # diffusers' own would keep some parts as they are
    network = family.network(module)
    spec = replace(bare_spec(family, network), itemsize=DTYPE.itemsize, latent_itemsize=4)
    asked: dict[str, Any] = {"width": width, "height": height, "num_inference_steps": num_steps}
    scheduler_config = bare_scheduler(family)
    plain = resolve(spec, scheduler_config, least_request(spec, **asked))
    features = {"none": plain.feature_bytes}
    for mode, cls in REGISTRY.items():
        try:
            accelerator: Accelerator = cls(mode=mode, **OF_A_PROFILE.get(mode, {}))
            run = resolve(spec, scheduler_config, least_request(spec, acceleration=accelerator, **asked))
        except (RequestError, ValueError):  # on another kind of network, or nothing without a file of its own
            continue
        features[mode] = run.feature_bytes
    size = (plain.height // spec.latent_scale, plain.width // spec.latent_scale)

    def peak(rows: int) -> int:
        x = torch.empty(rows, family.input_channels(module.config), *size, device="meta", dtype=DTYPE)
        given = family.dummy(module.config, rows, family.usual_text_tokens)
        given = {name: t.to(DTYPE) if t.is_floating_point() else t for name, t in given.items()}
        return peak_bytes(network, x, given)

    one, two = peak(1), peak(2)
    stored = list(module.state_dict().values())
    return MemoryPlan(
        parameters=sum(t.numel() for t in stored),
        weights=sum(t.nbytes for t in stored),
        activations=two - one,
        base=max(0, 2 * one - two),
        features=features,
        rows_an_image=plain.plain_roles,
    )


def peak_bytes(network: Network, x: Tensor, conditioning: dict[str, Tensor]) -> int:
    """The most bytes of tensors that live at once in one plain forward, without the weights."""
    rows = [Row(RowPlan(), "conditional", i) for i in range(len(x))]
    t = torch.empty(len(x), device="meta")
    with torch.inference_mode(), Live() as live, WithoutAttention():
        network.forward(x, t, conditioning, rows, FeatureStore())
    return int(live.peak) + x.nbytes + sum(given.nbytes for given in conditioning.values())


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages of all tensors that operators return, from the first tensor on each to the last."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch."""
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in (t for t in tree_leaves(out) if isinstance(t, Tensor)):
            storage, size = t.untyped_storage()._cdata, t.untyped_storage().nbytes()
            if not self._users[storage]:
                if storage in given:  # a weight's, or what the caller holds
                    continue
                self._now += size
                self.peak = max(self.peak, self._now)
            self._users[storage] += 1
            weakref.finalize(t, self._gone, storage, size)
        return out

    def _gone(self, storage: int, size: int) -> None:
        self._users[storage] -= 1
        if not self._users[storage]:
            self._now -= size
