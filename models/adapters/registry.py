"""The adapters of one model: which there are, and which of them are on the device."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary, WeakSet

from models.adapters.lora import Lora, meta_lora
from models.errors import ModelLoadError, UnknownAdapter
from models.spec import AdapterInfo

Read = Callable[[Path, str], Lora]
"""Reads a file as the adapter of a name, onto the device. Raises `ModelLoadError`."""


class Adapters(Mapping[str, AdapterInfo]):
    """By name, what is registered now. Safe on any thread.

    Their files are the store: on the device are those used last, up to `max_bytes`, and those that rows run under. One
    that is taken out is there for whoever holds its `AdapterInfo`, until nobody does.
    """

    def __init__(self, read: Read, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._read = read
        self._infos: dict[str, AdapterInfo] = {}
        self._files: WeakKeyDictionary[AdapterInfo, Path] = WeakKeyDictionary()
        self._digests: WeakKeyDictionary[AdapterInfo, str] = WeakKeyDictionary()
        self._weightless: WeakKeyDictionary[AdapterInfo, Lora] = WeakKeyDictionary()
        self._kept: OrderedDict[AdapterInfo, Lora] = OrderedDict()  # the newest last
        self._alive: WeakSet[Lora] = WeakSet()
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> AdapterInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._infos))

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def nbytes(self) -> int:
        """Bytes on the device, with those of adapters that are registered no more and still run."""
        with self._lock:
            return sum(lora.nbytes for lora in tuple(self._alive))

    def register(self, path: str | Path, name: str) -> AdapterInfo:
        """Read and check a file, and offer it by this name. Raises `ModelLoadError`, and then nothing has changed."""
        return self.add(self.read(Path(path), name), Path(path))

    def read(self, path: Path, name: str) -> Lora:
        """Read and check a file. Raises `ModelLoadError`."""
        lora = self._read(path, name)
        if self.max_bytes is not None and lora.nbytes > self.max_bytes:
            raise ModelLoadError(f"{path}: {lora.nbytes} bytes are more than the {self.max_bytes} of all adapters")
        return lora

    def add(self, lora: Lora, path: Path) -> AdapterInfo:
        """Offer what was read from a file. Raises `ModelLoadError` where there is one of its name."""
        name = lora.info.name
        with self._lock:
            if name in self._infos:
                raise ModelLoadError(f"{path}: there is an adapter {name!r} already")
            self._files[lora.info] = path
            self._digests[lora.info] = lora.digest
            self._weightless[lora.info] = meta_lora(lora)
            self._infos[name] = lora.info
            self._keep(lora.info, lora)
        return lora.info

    def forget(self, name: str) -> AdapterInfo:
        """Offer it no more. Raises `KeyError` where there is none."""
        with self._lock:
            info = self._infos.pop(name)
            self._kept.pop(info, None)
        return info

    def file(self, info: AdapterInfo) -> Path:
        """Where it lies."""
        return self._files[info]

    def moved(self, info: AdapterInfo, path: Path) -> None:
        """Its file lies elsewhere from now on."""
        with self._lock:
            self._files[info] = path

    def fetch(self, info: AdapterInfo) -> Lora:
        """An adapter on the device, from its file where it is not there. Raises `UnknownAdapter`."""
        with self._lock:
            if info in self._kept:
                self._kept.move_to_end(info)
                return self._kept[info]
            path, digest = self._files[info], self._digests[info]
        try:
            lora = replace(self._read(path, info.name), info=info)
        except ModelLoadError as error:
            raise UnknownAdapter("loras", f"{info.name!r} cannot be read any more: {error}") from error
        if lora.digest != digest:
            raise UnknownAdapter("loras", f"the file of {info.name!r} has changed since it was registered")
        with self._lock:
            self._keep(info, lora)
            return self._kept.get(info, lora)

    def digest(self, info: AdapterInfo) -> str:
        """Tells its weights from another's."""
        return self._digests[info]

    def weightless(self, info: AdapterInfo) -> Lora:
        """The adapter without storage, for counting what it costs."""
        return self._weightless[info]

    def release(self) -> None:
        """Let go of what no row runs under, for when the device has no memory left."""
        with self._lock:
            self._kept.clear()

    def _keep(self, info: AdapterInfo, lora: Lora) -> None:
        """Make room for it: the ones used longest ago go. What is registered no more is not kept."""
        self._alive.add(lora)
        if self._infos.get(info.name) is not info:
            return
        self._kept.setdefault(info, lora)
        self._kept.move_to_end(info)
        while self.max_bytes is not None and sum(one.nbytes for one in self._kept.values()) > self.max_bytes:
            self._kept.popitem(last=False)
