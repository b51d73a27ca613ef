"""Adapters that come and go while the server runs: kept as files, checked before anybody sees them."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import threading
import weakref
from pathlib import Path
from typing import BinaryIO

from app.errors import Conflict, Impossible, NotFound, StoreFull, StoreOff
from app.logs import SERVER
from models.backbone import Backbone
from models.errors import ModelLoadError, cut
from models.spec import AdapterInfo

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SUFFIX = ".safetensors"
PART, REMOVED = ".part", ".removed"
"""Endings of files that are no adapter yet, and no adapter any more: a start sweeps them."""


class AdapterFiles:
    """`DATA_DIR/adapters/MODEL/NAME.safetensors`. Safe on any thread."""

    def __init__(self, data_dir: Path | None, most_bytes: int) -> None:
        """`most_bytes`: of all files together."""
        self._directory = None if data_dir is None else data_dir / "adapters"
        self._most = most_bytes
        self._lock = threading.Lock()

    def restore(self, model: str, backbone: Backbone) -> None:
        """Register what was added before. A file that is none any more is logged, and left where it is."""
        if self._directory is None or not (folder := self._directory / model).is_dir():
            return
        for left in (*folder.glob(f"*{PART}"), *folder.glob(f"*{REMOVED}")):
            left.unlink(missing_ok=True)
        for file in sorted(folder.glob(f"*{SUFFIX}")):
            try:
                backbone.adapters.register(file, file.name.removesuffix(SUFFIX))
            except ModelLoadError as error:
                SERVER.error("an adapter of %s cannot be used: %s", model, error)

    def add(self, model: str, backbone: Backbone, name: str, source: BinaryIO, size: int) -> AdapterInfo:
        """Keep a file and offer it: on the disk when this returns. Raises a `ServiceError`, and nothing has changed."""
        if self._directory is None:
            raise StoreOff("this server keeps no adapters: it was started without --data-dir")
        if not NAME.fullmatch(name):
            raise Impossible(
                f"name: {cut(name)!r} is not 1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit",
                param="name",
            )
        with self._lock:
            if name in backbone.adapters:
                raise Conflict(f"name: {model} has an adapter {name!r} already; delete it first", param="name")
            used = sum(file.stat().st_size for file in self._directory.glob(f"*/*{SUFFIX}"))
            if used + size > self._most:
                raise StoreFull(f"adapters of {used} bytes are kept already, of {self._most}")
            folder = self._directory / model
            part, file = folder / f"{secrets.token_hex(8)}{PART}", folder / f"{name}{SUFFIX}"
            try:
                _write(part, source)
                lora = backbone.adapters.read(part, name)
                os.replace(part, file)
                _sync(folder)
            except ModelLoadError as error:
                raise Impossible(f"file: {str(error).removeprefix(f'{part}: ')}", param="file") from error
            except OSError as error:
                raise StoreFull(f"the adapter could not be written: {error.strerror}") from error
            finally:
                part.unlink(missing_ok=True)
            try:
                return backbone.adapters.add(lora, file)
            except ModelLoadError as error:
                file.unlink(missing_ok=True)
                raise Impossible(f"file: {error}", param="file") from error

    def remove(self, model: str, backbone: Backbone, name: str) -> AdapterInfo:
        """Offer an adapter no more. Its file goes when the last picture under it is done; one given at start stays."""
        with self._lock:
            try:
                info = backbone.adapters.forget(name)
            except KeyError as error:
                raise NotFound(f"name: {model} has no adapter {cut(name)!r}", param="name") from error
            file = None if self._directory is None else self._directory / model / f"{name}{SUFFIX}"
            if file is not None and backbone.adapters.file(info) == file:
                gone = file.with_name(f"{secrets.token_hex(8)}{REMOVED}")
                os.replace(file, gone)
                _sync(file.parent)
                backbone.adapters.moved(info, gone)
                weakref.finalize(info, gone.unlink, missing_ok=True)
        return info


def _write(file: Path, source: BinaryIO) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with file.open("xb") as out:
        shutil.copyfileobj(source, out, 2**20)
        out.flush()
        os.fsync(out.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
