"""`burnish jobs`, `show`, `wait`, `logs`, `cancel` and `retry`: jobs that the service has."""

from __future__ import annotations

from typing import get_args

import click
from rich.markup import escape

from burnish.client import Client, Job
from burnish.commands.service import with_service
from burnish.errors import JobFailed
from burnish.progress import watching
from burnish.screen import Screen, age, colour, status_text
from shared.report import Verdict
from shared.schemas import JobStatus

GOALS_NOT_MET = 4
WHY_NOT_MET: dict[Verdict, str] = {
    "missed": "its result misses a goal",
    "not_shown": "its evaluation samples do not show that every goal is met; more of them, or wider goals, settle it",
    "not_evaluated": "not all of its goals could be evaluated",
    "no_gain": "its result is neither smaller nor faster than your model",
}

job_id = click.argument("job_id", metavar="JOB")


@click.command()
@click.option("--status", type=click.Choice(get_args(JobStatus)), help="Only jobs with this status.")
@click.option("--tag", help="Only jobs with this tag.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many, newest first.")
@with_service
def jobs(client: Client, screen: Screen, status: JobStatus | None, tag: str | None, limit: int) -> None:
    """List your jobs, newest first."""
    found = list(client.jobs(status=status, tag=tag, limit=limit))
    if screen.as_json:
        screen.document([job.view for job in found])
        return
    rows = [
        [escape(job.name), status_text(job.view), colour(job.verdict), age(job.view.created_at), job.url]
        for job in found
    ]
    screen.table(["name", "status", "verdict", "age", "url"], rows)


@click.command()
@job_id
@with_service
def show(client: Client, screen: Screen, job_id: str) -> None:
    """Show a job with its headline, stages and files.

    The headline is the verdict in words; it and the warnings are those of the report, once the job has one.
    """
    job = client.job(job_id)
    artifacts = job.artifacts()
    if screen.as_json:
        files = [artifact.model_dump(mode="json") for artifact in artifacts]
        screen.document({**job.view.model_dump(mode="json"), "artifacts": files})
        return
    screen.job(job.view, artifacts)


@click.command()
@job_id
@with_service
def wait(client: Client, screen: Screen, job_id: str) -> None:
    """Show a job's progress until it has ended, then the job.

    'burnish --help' lists the exit status of each verdict.
    """
    job = client.job(job_id)
    wait_for(job, screen)
    finish(job, screen)


@click.command()
@job_id
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@with_service
def logs(client: Client, screen: Screen, job_id: str, follow: bool) -> None:
    """Print a job's log."""
    job, told = client.job(job_id), list[str]()
    for text in job.logs(follow=follow):
        if screen.as_json:
            told.append(text)
        else:
            click.echo(text, nl=False)
    if screen.as_json:
        screen.document({"job": str(job.id), "url": job.url, "log": "".join(told)})


@click.command()
@job_id
@with_service
def cancel(client: Client, screen: Screen, job_id: str) -> None:
    """Cancel a job; one that has ended stays as it is."""
    _show_one(client.job(job_id).cancel(), screen)


@click.command()
@job_id
@click.option("--wait", "then_wait", is_flag=True, help="Show its progress until it has ended.")
@with_service
def retry(client: Client, screen: Screen, job_id: str, then_wait: bool) -> None:
    """Run an ended job's recipe again, as a new job."""
    job = client.job(job_id).retry()
    if then_wait:
        wait_for(job, screen)
        finish(job, screen)
    else:
        _show_one(job, screen)


def wait_for(job: Job, screen: Screen) -> None:
    """Wait for a job's end, showing on stderr what happens. Raises JobFailed."""
    try:
        with watching(job.view, screen.err) as on_event:
            job.wait(on_event=on_event)
    except JobFailed:
        if not screen.as_json:
            screen.job(job.view)
        raise
    except KeyboardInterrupt:
        screen.say(f"The job goes on: {escape(job.url)}")
        screen.say(f"See it again with 'burnish wait {job.id}'; stop it with 'burnish cancel {job.id}'.")
        raise


def finish(job: Job, screen: Screen) -> None:
    """Show a job that succeeded; exit with GOALS_NOT_MET unless its verdict is met."""
    _show_one(job, screen)
    if job.verdict != "met":
        why = WHY_NOT_MET[job.verdict or "not_evaluated"]
        screen.say(f"The job succeeded, but {why}. See 'burnish report {job.id}'.")
        click.get_current_context().exit(GOALS_NOT_MET)


def _show_one(job: Job, screen: Screen) -> None:
    if screen.as_json:
        screen.document(job.view)
    else:
        screen.job(job.view)
