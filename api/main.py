"""The front desk: one FastAPI application. Run it with `uvicorn --factory api.main:create_app`.

Give uvicorn `--http api.doorway:Doorway`, against requests that never end, and a --timeout-graceful-shutdown of a few
seconds: event streams stay open for as long as their jobs.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from anyio import to_thread
from fastapi import FastAPI

from api import artifacts, catalog, events, jobs
from api.changes import Changes
from api.deps import Service
from api.doorway import make_room
from api.errors import add_handlers
from api.limits import BodyLimit
from api.turns import Turns, Turnstile
from shared import log
from shared.db import make_sessions
from shared.doorbell import Doorbell
from shared.schemas import Problem
from shared.settings import Settings, get_settings
from shared.storage import Storage

THREADS = 12  # for the routes: as many as there are connections to the database; more only hold each other up
IN_A_HURRY = 500  # connections, beside those of clients that wait
# One of 5,000 who wait stops everyone for half a second, and has never found anything.
FULL_COLLECTIONS_ARE_RARE = (700, 10, 1_000)
DESCRIPTION = """
Burnish makes trained vision models small and fast: announce the model's and the data set's file, send their bytes to
the URLs that come back, submit a job that names them, follow its events, fetch the report and the engine.
"""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application, with settings from the environment unless they are given."""
    settings = settings or get_settings()
    log.configure(settings.log_level)
    if (room := make_room(settings.max_waiting + IN_A_HURRY)) < settings.max_waiting:
        log.get_logger().warning("few_open_files", max_waiting=settings.max_waiting, connections=room)
    turns = Turns()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sessions = make_sessions(settings)
        doorbell, changes = Doorbell(settings), Changes(settings, turns)
        app.state.service = Service(settings, sessions, Storage(settings), doorbell, changes)
        to_thread.current_default_thread_limiter().total_tokens = THREADS
        gc.freeze()  # what is here now stays: a full collection need not look at it again and again
        gc.set_threshold(*FULL_COLLECTIONS_ARE_RARE)
        yield
        await changes.close()
        doorbell.close()
        sessions.kw["bind"].dispose()

    app = Application(
        title="Burnish",
        version=version("burnish"),
        description=DESCRIPTION,
        lifespan=lifespan,
    )
    app.add_middleware(BodyLimit)
    app.add_middleware(Turnstile, turns)
    for router in (jobs.router, events.router, artifacts.router, catalog.router):
        app.include_router(router)
    add_handlers(app)
    return app


class Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The API's description, with the Problem that every error is."""
        described = super().openapi()
        schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        described["components"]["schemas"].update({**schema.pop("$defs", {}), "Problem": schema})
        return described
