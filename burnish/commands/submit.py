"""`burnish submit` and `burnish validate`: a job file on its way in."""

from __future__ import annotations

from pathlib import Path

import click

from burnish.client import Client
from burnish.commands.jobs import finish, wait_for
from burnish.commands.service import with_service
from burnish.progress import sending
from burnish.screen import Screen, note_text, reason_text, size

job_file = click.argument("job_file", type=click.Path(path_type=Path))


@click.command()
@job_file
@click.option("--wait", "then_wait", is_flag=True, help="Show its progress until it has ended.")
@click.option("--idempotency-key", metavar="KEY", help="The same key again gives the same job, not a second one.")
@with_service
def submit(client: Client, screen: Screen, job_file: Path, then_wait: bool, idempotency_key: str | None) -> None:
    """Submit the job that a YAML file describes.

    Local files may stand for artifact ids in recipe.source.weights, recipe.source.onnx and recipe.data.artifact, by
    paths relative to the YAML file. They are uploaded, unless the service has them already. What 'burnish validate'
    would note is said on stderr.
    """
    with sending(screen.err) as on_bytes:
        request = client.prepare(job_file, on_bytes=on_bytes)
    for note in client.validate(request).notes:
        screen.say(note_text(note))
    job = client.submit(request, idempotency_key=idempotency_key)
    if then_wait:
        wait_for(job, screen)
        finish(job, screen)
    elif screen.as_json:
        screen.document(job.view)
    else:
        screen.job(job.view)


@click.command()
@job_file
@with_service
def validate(client: Client, screen: Screen, job_file: Path) -> None:
    """Check a job file to the end without submitting it.

    Its local files are uploaded, for the service checks them too; submit does not send them again. Notes are advice:
    goals that are assumed, a loss that the evaluation part is too small to show, a goal that allows very much.
    """
    with sending(screen.err) as on_bytes:
        found = client.validate(job_file, on_bytes=on_bytes)
    if screen.as_json:
        screen.document(found)
        return
    screen.line(f"{job_file} is [green]valid[/].")
    screen.line(f"needs {', '.join(found.requires)}, and about {size(found.required_memory_bytes)} of memory")
    if found.waiting_reason is None:
        screen.line(f"{found.capable_workers} live worker(s) can run it")
    else:
        screen.line(f"it would wait: {reason_text(found.waiting_reason)}")
    for note in found.notes:
        screen.line(note_text(note))
