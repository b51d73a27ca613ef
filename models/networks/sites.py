"""What the networks declare of themselves: where a row may take a result from memory. Plain data, no tensor."""

from __future__ import annotations

from dataclasses import dataclass

from models.reuse.sites import OUTPUT, Feature, Kind, Site, Span


def level(number: int) -> Site:
    """Everything inside level `number` of a U-Net: what enters the output block that closes it."""
    return Site("level", number)


def blocks(start: int, stop: int) -> Site:
    """Transformer blocks [start, stop)."""
    return Site("blocks", start, stop)


def attention(number: int) -> Site:
    """The self-attention of transformer block `number`."""
    return Site("attention", number)


def image_attention(number: int) -> Site:
    """The attention of image tokens among themselves beside the joint one of transformer block `number`."""
    return Site("image_attention", number)


def cross_attention(number: int) -> Site:
    """The cross-attention of transformer block `number`."""
    return Site("cross_attention", number)


def feed_forward(number: int) -> Site:
    """The feed-forward of transformer block `number`."""
    return Site("feed_forward", number)


MODULES = ("attention", "image_attention", "cross_attention", "feed_forward")
"""Kinds of the sites inside a block, in the order in which they run."""


@dataclass(frozen=True, slots=True)
class UNetSites:
    """Nested levels. `channels` and `halvings` of the hidden state that enters each level's output block; `skips` are
    the channels of the one that leaves its input block, of the same height and width.

    Part l is input block l, part L the middle, part 2L - l the output block that closes level l.
    """

    latent_channels: int
    channels: tuple[int, ...]
    halvings: tuple[int, ...]
    skips: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """Input blocks, L."""
        return len(self.channels)

    def span(self, site: Site) -> Span:
        """See `Sites`."""
        if site == OUTPUT:
            return 0, 2 * self.depth + 1
        if site.kind != "level" or not 0 <= site.start < self.depth:
            raise KeyError(f"{site}: this network has levels 0..{self.depth - 1}")
        return site.start + 1, 2 * self.depth - site.start

    def remembers(self, site: Site) -> Kind:
        """See `Sites`."""
        return "value"

    def understands(self, site: Site) -> frozenset[str]:
        """See `Sites`."""
        return frozenset({"recall"} if site == OUTPUT else {"recall", "zeros", "gated by input"})

    def shape(self, feature: Feature, height: int, width: int) -> tuple[int, ...]:
        """See `Sites`."""
        if feature.site == OUTPUT:
            return self.latent_channels, height, width
        for _ in range(self.halvings[feature.site.start]):
            height, width = (height + 1) // 2, (width + 1) // 2
        channels = self.skips if feature.kind == "probe" else self.channels
        return channels[feature.site.start], height, width


@dataclass(frozen=True, slots=True)
class TransformerSites:
    """A sequence of blocks with a self-attention each. Parts 4k to 4k + 3 are the `MODULES` that block k may have."""

    latent_channels: int
    depth: int
    patch_size: int
    dim: int
    heads: int
    head_dim: int
    offers: frozenset[str] = frozenset()  # what not every transformer can: "modulated" probes, modules

    def span(self, site: Site) -> Span:
        """See `Sites`."""
        start, stop, parts = site.start, site.stop, len(MODULES)
        if site == OUTPUT:
            return 0, parts * self.depth
        if site.kind in MODULES and 0 <= start < self.depth:
            part = parts * start + MODULES.index(site.kind)
            return part, part + 1
        if site.kind == "blocks" and stop is not None and 0 <= start < stop <= self.depth:
            return parts * start, parts * stop
        raise KeyError(f"{site}: this network has blocks 0..{self.depth} with an attention each")

    def remembers(self, site: Site) -> Kind:
        """See `Sites`."""
        return "effect" if site.kind == "blocks" else "value"

    def understands(self, site: Site) -> frozenset[str]:
        """See `Sites`."""
        if site.kind == "attention":
            return frozenset({"recall", "window", "shared"})
        if site.kind in MODULES:
            return frozenset({"recall"} if site.kind in self.offers else ())
        if site.kind != "blocks":
            return frozenset({"recall"})
        probes = {"input"} | ({"residual"} if site.start else set()) | (self.offers & {"modulated"})
        return frozenset({"recall", *(f"gated by {probe}" for probe in probes)})

    def image(self, tokens: int, height: int, width: int) -> slice:
        """Which of so many tokens are the image's, for latents of this size."""
        return slice(0, tokens)

    def shape(self, feature: Feature, height: int, width: int) -> tuple[int, ...]:
        """See `Sites`."""
        if feature.site == OUTPUT:
            return self.latent_channels, height, width
        tokens = (height // self.patch_size) * (width // self.patch_size)
        if feature.kind == "residual":
            return self.heads, tokens, self.head_dim
        return tokens, self.dim


@dataclass(frozen=True, slots=True)
class JointSites(TransformerSites):
    """Blocks over text and image tokens together; what is remembered is of both, but for what the image's tokens give
    among themselves. `text_tokens` is the longest prompt; both kinds come in multiples of `multiple`.

    `modules` says what each block has. From block `parallel` on, attention and feed-forward run side by side and end in
    one projection: its result is the feed-forward's, which so contains the attention.

    An attention can be recalled, or banded among the image's tokens while all see the text, but not shared with the
    unconditional row, whose text is another.
    """

    text_tokens: int = 0
    multiple: int = 1
    image_first: bool = False
    modules: tuple[frozenset[str], ...] = ()
    parallel: int | None = None

    def span(self, site: Site) -> Span:
        """See `Sites`."""
        start, stop = TransformerSites.span(self, site)
        if site.kind == "feed_forward" and self.parallel is not None and site.start >= self.parallel:
            return stop - len(MODULES), stop
        return start, stop

    def understands(self, site: Site) -> frozenset[str]:
        """See `Sites`."""
        if site.kind not in MODULES:
            return TransformerSites.understands(self, site)
        if not 0 <= site.start < self.depth or site.kind not in self.modules[site.start]:
            return frozenset()
        return frozenset({"recall", "window"} if site.kind == "attention" else {"recall"})

    def image(self, tokens: int, height: int, width: int) -> slice:
        """See `TransformerSites`."""
        image = (height // self.patch_size) * (width // self.patch_size)
        return slice(0, image) if self.image_first else slice(tokens - image, tokens)

    def shape(self, feature: Feature, height: int, width: int) -> tuple[int, ...]:
        """See `Sites`; gates look at the image's own tokens."""
        if feature.site == OUTPUT:
            return self.latent_channels, height, width
        image = (height // self.patch_size) * (width // self.patch_size)
        if feature.kind == "probe" or feature.site.kind == "image_attention":
            return image, self.dim
        tokens = sum(count + -count % self.multiple for count in (image, self.text_tokens))
        return (self.heads, tokens, self.head_dim) if feature.kind == "residual" else (tokens, self.dim)
