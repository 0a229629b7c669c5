"""`burnish admin`: what only who runs the service may do, straight on its database."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TextIO
from uuid import UUID

import click

from burnish.admin import allow, collect, create_key, export_account, find_settings, import_account, reconcile
from burnish.admin import release as release_job
from burnish.commands.service import as_json
from burnish.screen import Screen

in_directory = click.option(
    "--dir", "directory", type=click.Path(file_okay=False, path_type=Path), help="Local mode's directory."
)


@click.group()
def admin() -> None:
    """Run the service: needs its settings (BURNISH_DATABASE_URL and secrets), or local mode."""


@admin.group()
def key() -> None:
    """API keys."""


@key.command()
@click.option("--account", metavar="NAME", help="Whose key; made if there is none of that name.")
@click.option("--name", default="made by burnish admin", show_default=True, help="What the key is for.")
@in_directory
@as_json
def create(account: str | None, name: str, directory: Path | None, as_json: bool) -> None:
    """Make an API key and print it: the only time that it is shown."""
    settings, default_account = find_settings(directory)
    account = account or default_account
    made, screen = create_key(settings, account, name), Screen(as_json)
    if as_json:
        screen.document({"account": account, "name": name, "api_key": made})
        return
    screen.say(f"A key of the account {account!r}; it is not shown again:")
    screen.text(made)


THE_SERVICES = -1


class Limit(click.ParamType[int]):
    """A number, or the word that stands for the service's own limit."""

    name = "N|default"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "default":
            return THE_SERVICES
        if not str(value).isdecimal() or int(value) >= 2**31 * (2**32 if param and param.name == "max_bytes" else 1):
            self.fail(f"{value!r} is neither a possible number nor the word 'default'", param, ctx)
        return int(value)


@admin.command()
@click.argument("account", metavar="ACCOUNT")
@click.option("--max-jobs", type=Limit(), help="Jobs that may be queued or running at once.")
@click.option("--max-bytes", type=Limit(), help="Bytes that its uploads may have in all.")
@in_directory
@as_json
def quota(account: str, max_jobs: int | None, max_bytes: int | None, directory: Path | None, as_json: bool) -> None:
    """Tell what an account has of what it may have. With options, give it limits of its own, or the service's again.

    What it has beyond a lower limit it keeps.
    """
    settings, _account = find_settings(directory)
    asked = {"max_active_jobs": max_jobs, "max_stored_bytes": max_bytes}
    limits = {name: None if limit == THE_SERVICES else limit for name, limit in asked.items() if limit is not None}
    found, screen = allow(settings, account, **limits), Screen(as_json)
    if as_json:
        defaults = {
            "default_max_active_jobs": settings.max_active_jobs_per_account,
            "default_max_stored_bytes": settings.max_stored_bytes_per_account,
        }
        screen.document({"account": account, **asdict(found), **defaults})
        return
    for number, own, default, what in (
        (found.active_jobs, found.max_active_jobs, settings.max_active_jobs_per_account, "jobs queued or running"),
        (found.stored_bytes, found.max_stored_bytes, settings.max_stored_bytes_per_account, "bytes of uploads"),
    ):
        whose, limit = ("the service's limit", default) if own is None else ("its own limit", own)
        screen.text(f"{number:>16,} of {limit:,} {what} ({whose})")


@admin.command()
@click.argument("job_id", metavar="JOB", type=click.UUID)
@in_directory
@as_json
def release(job_id: UUID, directory: Path | None, as_json: bool) -> None:
    """Run a quarantined job again, as a new one, and no longer hold its crashes against its input."""
    settings, _account = find_settings(directory)
    new_id, is_new = release_job(settings, job_id)
    screen = Screen(as_json)
    if as_json:
        screen.document({"job_id": str(job_id), "released_as": str(new_id), "new": is_new})
        return
    screen.say("The job runs again, as:" if is_new else "The job was released before; it ran again as:")
    screen.text(str(new_id))


@admin.command()
@click.option("--dry-run", is_flag=True, help="Tell what would be removed, and remove nothing.")
@in_directory
@as_json
def gc(dry_run: bool, directory: Path | None, as_json: bool) -> None:
    """Remove what nobody keeps any more: jobs past their retention, expired uploads, files that nothing points to."""
    settings, _account = find_settings(directory)
    found, screen = collect(settings, dry_run=dry_run), Screen(as_json)
    if as_json:
        screen.document({"dry_run": dry_run, **asdict(found)})
        return
    screen.say("Would be removed:" if dry_run else "Removed:")
    for name, number in asdict(found).items():
        screen.text(f"{number:>8} {name.replace('_', ' ')}")


@admin.command()
@click.argument("account", metavar="ACCOUNT")
@in_directory
def export(account: str, directory: Path | None) -> None:
    """Write an account's rows to stdout, as JSON lines that `import` takes back. Files in storage are not in it."""
    settings, _account = find_settings(directory)
    for line in export_account(settings, account):
        click.echo(line)


@admin.command("import")
@click.argument("backup", metavar="FILE", type=click.File(encoding="utf-8"))
@in_directory
@as_json
def import_(backup: TextIO, directory: Path | None, as_json: bool) -> None:
    """Take an account back from what `export` wrote (FILE, or - for stdin): all of it, or nothing.

    Nothing that is here is overwritten. Jobs that ran then run again after their last finished stage.
    """
    settings, _account = find_settings(directory)
    taken, screen = import_account(settings, backup), Screen(as_json)
    if as_json:
        screen.document({"rows": taken.rows, "missing_files": taken.missing})
        return
    for table, number in taken.rows.items():
        screen.text(f"{number:>8} {table}")
    _tell_missing(taken.missing, screen)


@admin.command("reconcile")
@in_directory
@as_json
def reconcile_(directory: Path | None, as_json: bool) -> None:
    """After the database was set back to an older state: fence all workers off, and tell what storage lacks.

    Jobs that ran in the older state are given to workers anew. What was stored since is left to `gc`.
    """
    settings, _account = find_settings(directory)
    taken, screen = reconcile(settings), Screen(as_json)
    if as_json:
        screen.document({"requeued": taken.rows["jobs"], "missing_files": taken.missing})
        return
    screen.text(f"{taken.rows['jobs']:>8} running jobs are given to workers anew")
    _tell_missing(taken.missing, screen)


def _tell_missing(missing: list[str], screen: Screen) -> None:
    screen.text(f"{len(missing):>8} files that rows name are not in storage")
    for key in missing:
        screen.text(f"         {key}")
