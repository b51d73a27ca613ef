"""`slipstream jobs`: the store from the command line, also beside a running server and without one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.commands.options import FolderOption, progress_bar

if TYPE_CHECKING:
    from app.jobs.queue import Jobs

commands = typer.Typer(
    name="jobs", help="The jobs of a store, whoever submitted them.", no_args_is_help=True, rich_markup_mode=None
)

DirectoryOption = Annotated[
    Path | None, typer.Option("--data-dir", envvar="SLIPSTREAM_DATA_DIR", help="The server's data directory.")
]
UrlOption = Annotated[
    str | None, typer.Option("--jobs-url", envvar="SLIPSTREAM_JOBS_URL", help="postgresql+psycopg://...")
]
StatusOption = Annotated[str | None, typer.Option(help="Only those in this state.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
JobArgument = Annotated[str, typer.Argument(metavar="ID")]


@contextmanager
def opened(data_dir: Path | None, jobs_url: str | None) -> Iterator[Jobs]:
    """The store's jobs. What a user got wrong is a line and exit code 2."""
    from app.errors import ServiceError
    from app.jobs.database import FILE, StoreError
    from app.jobs.queue import Jobs
    from app.jobs.store import Store

    if jobs_url is None and (data_dir is None or not (data_dir / FILE).is_file()):
        raise StoreError(f"{data_dir or '--data-dir'}: there is no store")
    store = Store(data_dir, jobs_url, exclusive=False)
    try:
        yield Jobs(store)
    except ServiceError as error:
        raise StoreError(error.message) from error
    finally:
        store.close()


def plain(row: Any) -> dict[str, Any]:
    """A job as JSON: what is kept of it, without the store's own numbers."""
    hidden = {"seq", "turn", "fingerprint", "lease_owner", "lease_until", "cancel"}
    return {name: value for name, value in row.items() if name not in hidden}


@commands.command("list")
def listed(
    data_dir: DirectoryOption = None,
    jobs_url: UrlOption = None,
    status: StatusOption = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List jobs, the latest first."""
    with opened(data_dir, jobs_url) as jobs:
        rows, more = jobs.page(None, limit, status=status)
        counts = jobs.counts()
    if as_json:
        for row in rows:
            typer.echo(json.dumps(plain(row)))
        return
    table = Table("id", "status", "done", "accepted", "model", "seed", "prompt")
    for row in rows:
        done = f"{100 * row['step'] // row['total_steps']} %" if row["total_steps"] else "-"
        body, accepted = row["body"], datetime.fromtimestamp(row["created_at"]).strftime("%d %b %H:%M:%S")
        prompt = Text("".join(c if c.isprintable() else " " for c in str(body.get("prompt", ""))[:60]))
        table.add_row(row["id"], row["status"], done, accepted, body.get("model"), str(body.get("seed")), prompt)
    console = Console()
    console.print(table)
    console.print(", ".join(f"{count} {name}" for name, count in counts.items()) + (" (more: --limit)" if more else ""))


@commands.command()
def show(job_id: JobArgument, data_dir: DirectoryOption = None, jobs_url: UrlOption = None) -> None:
    """Print all that is kept of a job, as JSON."""
    with opened(data_dir, jobs_url) as jobs:
        typer.echo(json.dumps(plain(jobs.get(job_id, None)), indent=2))


@commands.command()
def cancel(job_id: JobArgument, data_dir: DirectoryOption = None, jobs_url: UrlOption = None) -> None:
    """Cancel a job; a server that runs it stops within seconds."""
    with opened(data_dir, jobs_url) as jobs:
        row = jobs.cancel(job_id, None)
    typer.echo(row["status"] if row["status"] == "cancelled" else "the server that runs it was asked to stop")


@commands.command()
def export(
    output: FolderOption,
    job_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Which; without any, all.")] = None,
    data_dir: DirectoryOption = None,
    jobs_url: UrlOption = None,
) -> None:
    """Write the pictures of finished jobs into a folder, each job's facts beside them."""
    output.mkdir(parents=True, exist_ok=True)
    with opened(data_dir, jobs_url) as jobs, progress_bar("exporting") as progress:
        task = progress.task_ids[0]
        total = len(job_ids) if job_ids else jobs.counts()["completed"]
        progress.update(task, total=total)
        for row in _chosen(jobs, job_ids):
            _export(jobs, row, output)
            progress.advance(task)


def _chosen(jobs: Jobs, job_ids: list[str] | None) -> Iterator[Any]:
    """The finished jobs that are asked for, or all, some at a time."""
    if job_ids:
        yield from (jobs.get(job_id, None) for job_id in job_ids)
        return
    after, more = None, True
    while more:
        rows, more = jobs.page(None, 100, after, "completed")
        yield from rows
        after = rows[-1]["id"] if rows else None


def _export(jobs: Jobs, row: Any, output: Path) -> None:
    if row["status"] != "completed":
        typer.echo(f"{row['id']} is {row['status']}: it has no pictures", err=True)
        return
    suffix = row["body"].get("output_format", "png")
    for index in range(len(row["result"]["seeds"])):
        with (output / f"{row['id']}-{index}.{suffix}").open("wb") as file:
            file.writelines(jobs.store.read(row["id"], f"picture-{index}"))
    (output / f"{row['id']}.json").write_text(json.dumps(plain(row), indent=2) + "\n")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(commands)
