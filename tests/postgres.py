"""A real PostgreSQL of Debian's, started by the tests on a socket of its own; skipped with the reason without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@contextmanager
def postgres() -> Iterator[str]:
    """A server with an empty database: its URL. It ends with the block."""
    if not BINARIES:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    if os.getuid() == 0 and shutil.which("runuser") is None:
        pytest.skip("PostgreSQL does not run as root, and there is no runuser")
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="slipstream-pg-", dir="/tmp"))
    folder.chmod(0o777)
    data = folder / "data"

    def run(*command: str | Path) -> None:
        ended = subprocess.run([*user, *map(str, command)], capture_output=True, text=True, check=False, cwd=folder)
        if ended.returncode:
            raise RuntimeError(f"{command}: {ended.stdout} {ended.stderr}")

    try:
        run(BINARIES[-1] / "initdb", "-D", data, "-U", "slipstream", "--auth=trust", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c max_connections=60"
        run(BINARIES[-1] / "pg_ctl", "-D", data, "-w", "-o", options, "-l", folder / "log", "start")
        try:
            yield f"postgresql+psycopg://slipstream@/postgres?host={folder}"
        finally:
            run(BINARIES[-1] / "pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
