"""Encoded prompts that are kept, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from threading import Lock
from typing import Any

from models.reuse.rows import Conditioning

MOST_BYTES = 256 * 2**20
"""A T5 prompt of 300 tokens is 2.4 MB in bfloat16, a CLIP one 0.1 MB."""

Encode = Callable[[list[str]], Conditioning]
"""Texts to tensors [texts, ...]."""


class SpareTokenizer:
    """A copy of a tokenizer for threads beside the engine's, as one cannot serve two at once. Made when first used."""

    def __init__(self) -> None:
        self._copy: Any = None
        self._lock = Lock()

    @contextmanager
    def of(self, tokenizer: Any) -> Iterator[Any]:
        """The copy, for one thread at a time."""
        with self._lock:
            if self._copy is None:
                self._copy = deepcopy(tokenizer)
            yield self._copy


class PromptCache:
    """The prompts that were asked for last, encoded, up to `max_bytes` on the device. Safe on any thread.

    `alone`: each is encoded by itself, so that its numbers do not depend on which others are new with it.
    """

    def __init__(self, max_bytes: int = MOST_BYTES, alone: bool = False) -> None:
        self.max_bytes = max_bytes
        self.alone = alone
        self._kept: OrderedDict[tuple[Hashable, str], Conditioning] = OrderedDict()  # the newest last
        self._bytes = 0
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return self._bytes

    def encode(self, texts: Sequence[str], encode: Encode, kind: Hashable = ()) -> list[Conditioning]:
        """Each text as [1, ...] tensors in a dict of its own; those not kept are encoded as a batch (`alone`: each).

        Prompts of one `kind` are kept apart from those of another: they were encoded otherwise.
        """
        with self._lock:
            found = {text: self._kept[kind, text] for text in texts if (kind, text) in self._kept}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        for together in [[text] for text in missing] if self.alone else [missing] if missing else []:
            batch = encode(together)
            found |= {text: {k: v[i : i + 1].clone() for k, v in batch.items()} for i, text in enumerate(together)}
        with self._lock:
            for text in texts:
                self._keep((kind, text), found[text])
        return [dict(found[text]) for text in texts]

    def release(self) -> None:
        """Forget everything, for when the device has no memory left."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def _keep(self, text: tuple[Hashable, str], encoded: Conditioning) -> None:
        if text not in self._kept:
            self._kept[text] = encoded
            self._bytes += _size(encoded)
        self._kept.move_to_end(text)
        while self._bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(encoded: Conditioning) -> int:
    return sum(tensor.nbytes for tensor in encoded.values())
