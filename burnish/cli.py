"""The `burnish` command."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from burnish.errors import BurnishError
from burnish.screen import Screen

# Where each command lives, in the order of the help. A command's module is imported when it is asked for.
COMMANDS = {
    "submit": "burnish.commands.submit:submit",
    "validate": "burnish.commands.submit:validate",
    "jobs": "burnish.commands.jobs:jobs",
    "show": "burnish.commands.jobs:show",
    "wait": "burnish.commands.jobs:wait",
    "logs": "burnish.commands.jobs:logs",
    "cancel": "burnish.commands.jobs:cancel",
    "retry": "burnish.commands.jobs:retry",
    "report": "burnish.commands.results:report",
    "download": "burnish.commands.results:download",
    "predict": "burnish.commands.results:predict",
    "workers": "burnish.commands.catalog:workers",
    "stages": "burnish.commands.catalog:stages",
    "targets": "burnish.commands.catalog:targets",
    "version": "burnish.commands.catalog:version",
    "local": "burnish.local.commands:local",
    "admin": "burnish.commands.admin:admin",
}
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    screen = Screen(as_json="--json" in arguments)
    try:
        status = burnish.main(list(arguments), prog_name="burnish", standalone_mode=False)
    except BurnishError as error:
        screen.error(error)
        status = error.exit_status
    except click.ClickException as error:
        error.show()
        status = 2 if isinstance(error, click.UsageError) else 3
        if screen.as_json:
            screen.document({"error": {"code": "usage" if status == 2 else "failed", "detail": error.format_message()}})
    except (click.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except BrokenPipeError:  # whoever read the answer has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)


class Commands(click.Group):
    """A group whose commands are imported one at a time, so that each starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def burnish() -> None:
    """Make trained vision models small and fast, and prove it.

    The service is the one of --url and --api-key, or of BURNISH_URL and BURNISH_API_KEY, or the local mode that runs
    here. With --json the answer is one JSON document on stdout; everything else goes to stderr.

    \b
    Exit status:
      0    it is done; a job that was waited for succeeded with the verdict met
      1    the job failed or was cancelled
      2    the request, or a file, is at fault
      3    the service is at fault, or cannot be reached
      4    the job succeeded with another verdict:
           missed         a goal is missed
           not_shown      the evaluation part is too small to show that every goal is met
           not_evaluated  a goal could not be evaluated
           no_gain        the result is neither smaller nor faster than the source model
      130  interrupted; a job that was waited for goes on
    """
