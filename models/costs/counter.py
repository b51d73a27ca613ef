"""Multiply-accumulates of a forward, a step, a run: counted by torch's flop counter on the meta device, weightless.

The network's own code runs on tensors without storage, a row at a time, so every plan is counted by what it would run.
A transformer is counted a block at a time: blocks that do the same cost the same.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from models.adapters.lora import Applied, Lora, meta_lora
from models.families import Family, of_network
from models.networks.base import Network
from models.networks.control import ControlNet
from models.networks.sites import MODULES, attention, blocks, level
from models.networks.transformer import Transformer, attention_rows
from models.networks.unet import UNet, truncate
from models.reuse.plans import Reading, Recall, RowPlan, StepRows, Twin, Zeros
from models.reuse.rows import Conditioning, Places, Row, RowControl
from models.reuse.sites import Feature, Site
from models.reuse.store import FeatureStore

MOST_COUNTS = 4096
"""Counts kept of one network: a number each, and a key of about 500 bytes. Sizes are a client's choice."""


class MacCounter:
    """Counts for one network, on any thread. It is made on the meta device once, when it is first needed."""

    def __init__(
        self,
        config: Mapping[str, Any],
        attention_matmuls: bool = True,
        depth: int | None = None,
        family: Family | None = None,
        controls: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """`depth`: of a U-Net loaded in part, the input blocks that were. `family`: whose network it is, if known.
        `controls`: the configs of its control networks."""
        self.config = config
        self.family = of_network(config) if family is None else family
        self.attention_matmuls = attention_matmuls
        self._depth = depth
        self._controls = dict(controls or {})
        self._counts: OrderedDict[tuple[Any, ...], int] = OrderedDict()
        self._keeping = threading.Lock()
        self._counting = threading.RLock()  # a count may need another

    @cached_property
    def network(self) -> Network:
        """The network on the meta device."""
        with torch.device("meta"):
            module = getattr(diffusers, self.family.network_class).from_config(self.config)
        if self._depth is not None:
            truncate(module, self._depth)
        return self.family.network(module.eval())

    @cached_property
    def controls(self) -> dict[str, ControlNet]:
        """The control networks on the meta device."""
        with torch.device("meta"):
            made = {name: ControlNetModel.from_config(config) for name, config in self._controls.items()}
        return {name: ControlNet(name, module.eval()) for name, module in made.items()}

    @property
    def parameters(self) -> int:
        """Weights of the whole network."""
        return sum(p.numel() for p in self._made().module.parameters())

    def at(self, latent_size: tuple[int, int], text_tokens: int = 77) -> Counts:
        """Counts at one latent size (height, width), for prompts of this length."""
        return Counts(self, self._made(), latent_size, text_tokens)

    def kept(self, key: tuple[Any, ...], count: Callable[[], int]) -> int:
        """A number that was counted before, or is now; the ones used longest ago make room."""
        if (known := self._known(key)) is not None:
            return known
        with self._counting:
            if (known := self._known(key)) is not None:
                return known
            counted = count()
            with self._keeping:
                self._counts[key] = counted
                while len(self._counts) > MOST_COUNTS:
                    self._counts.popitem(last=False)
            return counted

    def _known(self, key: tuple[Any, ...]) -> int | None:
        with self._keeping:
            if key in self._counts:
                self._counts.move_to_end(key)
            return self._counts.get(key)

    def _made(self) -> Network:
        with self._counting:
            return self.network


class Counts:
    """What rows cost at one latent size and length of prompts."""

    def __init__(self, counter: MacCounter, network: Network, latent_size: tuple[int, int], text_tokens: int) -> None:
        self._counter = counter
        self._network = network
        self._size = latent_size
        self._text_tokens = text_tokens

    def row(self, plan: RowPlan, adapters: Sequence[Lora] = ()) -> int:
        """MACs of one row of one forward, under adapters (without weights is enough)."""
        plain = self._row(plan, None)
        return plain + sum(self._row(plan, lora) - plain for lora in adapters)

    def _row(self, plan: RowPlan, lora: Lora | None) -> int:
        if isinstance(self._network, UNet):
            depth, short = _shortened(plan)
            return self._cached(("unet", depth, lora and lora.shapes), lambda: self._unet(short, lora))
        skipped = [range(s.start, s.stop or 0) for s in plan.reads if s.kind == "blocks"]
        run = [block for block in range(self._network.depth) if not any(block in inside for inside in skipped)]
        return self._cached(("frame", lora and lora.shapes), lambda: self._frame(lora)) + sum(
            self._block(plan, block, lora) for block in run
        )

    def step(self, rows: StepRows, student: Lora | None = None, styles: Sequence[Lora] = ()) -> int:
        """MACs of one step of one trajectory: the student where a plan asks for it, styles in every row."""
        taught = styles if student is None else (student, *styles)
        return sum(self.row(plan, taught if plan.adapter else styles) for plan in rows)

    def control(self, name: str, rows: StepRows) -> int:
        """MACs that a control network adds to one step of one trajectory; it goes as deep as each row."""
        total = 0
        for plan in rows:
            depth, short = _shortened(plan)
            total += self._cached(("control", name, depth), lambda short=short: self._steered(name, short))  # type: ignore[misc]
        return total

    def hint(self, name: str) -> int:
        """MACs of embedding the picture that a control network sees."""
        height, width = (side * 2 ** self._halvings(name) for side in self._size)
        pixels = torch.empty(1, 3, height, width, device="meta")
        network = self._counter.controls[name]
        return self._cached(("hint", name), lambda: self._count(lambda: network.hint(pixels)))

    def _halvings(self, name: str) -> int:
        return len(self._counter.controls[name].module.config.conditioning_embedding_out_channels) - 1

    def _steered(self, name: str, plan: RowPlan) -> int:
        network = self._counter.controls[name]
        hint = torch.empty(1, network.module.config.block_out_channels[0], *self._size, device="meta")
        return self._unet(plan, None, (RowControl(network, hint, 1.0),)) - self._unet(plan, None)

    def run(self, steps: Iterable[StepRows], student: Lora | None = None, styles: Sequence[Lora] = ()) -> int:
        """MACs of one trajectory."""
        return sum(self.step(rows, student, styles) for rows in steps)

    def _cached(self, key: tuple[Any, ...], count: Callable[[], int]) -> int:
        return self._counter.kept((self._size, self._text_tokens, *key), count)

    def _block(self, plan: RowPlan, block: int, lora: Lora | None) -> int:
        site = attention(block)
        reading = plan.reads.get(site)
        reuse = None if reading is None else reading.reuse
        residuals = frozenset(f.width for f in plan.keep if f.kind == "residual" and f.site == site)
        recalled = tuple((site.kind, len(one.entries)) for site, one in _modules(plan, block).items())
        assert isinstance(self._network, Transformer)  # noqa: S101
        alike = self._network.kind(block) if lora is None else block
        key = ("block", reuse, recalled, residuals, lora and lora.shapes, alike)
        return self._cached(key, lambda: self._one_block(plan, block, lora))

    @torch.inference_mode()
    def _one_block(self, plan: RowPlan, block: int, lora: Lora | None) -> int:
        """One row through one block. A twin needs its conditional row in the batch, which is taken off again."""
        assert isinstance(self._network, Transformer)  # noqa: S101
        network, site, store = self._network, attention(block), FeatureStore()
        reading = plan.reads.get(site)
        twin = reading is not None and isinstance(reading.reuse, Twin)
        keep = frozenset(f for f in plan.keep if f.site == site)
        reads = _modules(plan, block)
        row = Row(RowPlan(0, reads, keep), "conditional", self, adapters=_applied(lora))
        partner = Row(RowPlan(0, {}, keep), "conditional", self)
        if twin:
            row.role = "unconditional"
        rows = [partner, row] if twin else [row]
        x, t, conditioning = self._inputs(len(rows))
        network = network.under(rows)
        h, inputs, _ = network.begin(x, t, conditioning, rows)

        def run(rows: Sequence[Row]) -> None:
            network.block(block, h, inputs, attention_rows(rows, block, store, Places(h)))

        entries = {entry for one in reads.values() for entry in one.entries}
        for step in {step for _, step in entries}:  # remembered first, in the shapes that the block itself gives them
            features = frozenset(feature for feature, at in entries if at == step)
            run([Row(RowPlan(step, {}, features), "conditional", self, row.memory)])
        both = self._count(lambda: run(rows))
        if not twin:
            return both
        return both - self._block(partner.plan, block, None)

    @torch.inference_mode()
    def _frame(self, lora: Lora | None) -> int:
        """Everything of a transformer outside its blocks."""
        x, t, conditioning = self._inputs(1)
        network, store = self._network, FeatureStore()
        assert isinstance(network, Transformer)  # noqa: S101
        every = blocks(0, network.depth)
        entry = (Feature(every, "effect"), 0)
        row = Row(
            RowPlan(1, {every: Reading(Recall(), (entry,), (1.0,))}), "conditional", self, adapters=_applied(lora)
        )
        shape = network.begin(x, t, conditioning, [row])[0].shape[1:]
        store.write([(row.memory, entry)], torch.empty(1, *shape, device="meta"))
        return self._count(lambda: network.forward(x, t, conditioning, [row], store))

    def _unet(self, plan: RowPlan, lora: Lora | None, controls: tuple[RowControl, ...] = ()) -> int:
        x, t, conditioning = self._inputs(1)
        if controls:  # they are given the latents alone
            channels = self._counter.family.latent_channels(self._counter.config)
            conditioning["beside"], x = x[:, channels:], x[:, :channels]
        row = Row(plan, "conditional", self, adapters=_applied(lora), controls=controls)
        return self._count(lambda: self._network.forward(x, t, conditioning, [row], FeatureStore()))

    def _inputs(self, rows: int) -> tuple[Tensor, Tensor, Conditioning]:
        config: Any = self._network.module.config
        x = torch.empty(rows, self._counter.family.input_channels(config), *self._size, device="meta")
        conditioning = self._counter.family.dummy(config, rows, self._text_tokens)
        return x, torch.empty(rows, device="meta"), conditioning

    def _count(self, forward: Any) -> int:
        hidden: AbstractContextManager[Any] = nullcontext() if self._counter.attention_matmuls else WithoutAttention()
        with _Flops(display=False) as counter, torch.inference_mode(), hidden:
            forward()
        return int(counter.get_total_flops()) // 2


def _applied(lora: Lora | None) -> tuple[Applied, ...]:
    """An adapter, or none, as a row has it; on the meta device."""
    return () if lora is None else (Applied.of(meta_lora(lora), 1.0, "meta", torch.float32),)


def _shortened(plan: RowPlan) -> tuple[int | None, RowPlan]:
    """The level at which a row of a U-Net goes back, and a plan that does no more."""
    depth = min((site.start for site in plan.reads if site.kind == "level"), default=None)
    return depth, RowPlan() if depth is None else RowPlan(reads={level(depth): Reading(Zeros())})


def _modules(plan: RowPlan, block: int) -> dict[Site, Reading]:
    """What a row reads in place of modules of a block."""
    sites = (Site(kind, block) for kind in MODULES)
    return {site: plan.reads[site] for site in sites if site in plan.reads}


class _Flops(FlopCounterMode):
    """Counts this thread's operators only: without the tracker of modules, whose hooks see every thread's forwards."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mod_tracker = _NoTracker()  # type: ignore[assignment]


class _NoTracker:
    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class WithoutAttention(TorchFunctionMode):
    """Passes values through where attention would weigh them: the papers do not count its two products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))
