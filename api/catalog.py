"""What the service offers: stages, targets and workers; its version, and whether it is well."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version

from fastapi import APIRouter, Response

from api.deps import AccountDep, DoorbellDep, SessionsDep, StorageDep
from api.errors import GUARDED, problems
from shared import browse
from shared.db import ping
from shared.errors import ServiceError
from shared.recipe import BuildEngine, stage_kinds
from shared.schemas import Health, Readiness, StageKind, Target, Version, Worker
from shared.targets import Target as EngineTarget
from shared.targets import describe, every_target, name_of

router = APIRouter(tags=["catalog"])


@router.get("/v1/stages", summary="List the stages", operation_id="list_stages", responses=problems(*GUARDED))
async def stages(_: AccountDep) -> list[StageKind]:
    """Every stage of the language, with the schema of its words and their defaults."""
    return [
        StageKind(
            kind=kind,
            description=inspect.getdoc(spec) or "",
            consumes=spec.consumes,
            produces=spec.produces,
            json_schema=spec.model_json_schema(),
        )
        for kind, spec in stage_kinds().items()
    ]


@router.get("/v1/targets", summary="List the targets", operation_id="list_targets", responses=problems(*GUARDED))
def targets(_: AccountDep, sessions: SessionsDep) -> list[Target]:
    """What build_engine can build for, and how many live workers can do it."""
    capabilities = [set(worker["capabilities"]) for worker in browse.workers(sessions) if worker["alive"]]
    return [
        Target(
            name=name_of(target),
            target=target,
            description=describe(target),
            workers=sum(_needs(target) <= able for able in capabilities),
        )
        for target in every_target()
    ]


def _needs(target: EngineTarget) -> set[str]:
    return {"stage:build_engine", *BuildEngine(targets=[target]).requirements()}


@router.get("/v1/workers", summary="List the workers", operation_id="list_workers", responses=problems(*GUARDED))
def workers(_: AccountDep, sessions: SessionsDep) -> list[Worker]:
    """Every worker that was heard of in the last day, what it can do, and whether it is alive and busy."""
    return [Worker.model_validate(row) for row in browse.workers(sessions)]


@router.get("/v1/version", summary="Get the version", operation_id="get_version")
async def get_version() -> Version:
    return Version(version=version("burnish"))


@router.get("/healthz", summary="Is this process alive?", operation_id="get_health", tags=["health"])
async def healthz() -> Health:
    """Answers without asking anyone else."""
    return Health()


@router.get(
    "/readyz",
    summary="Can it serve?",
    operation_id="get_readiness",
    tags=["health"],
    responses={503: {"model": Readiness, "description": "The database or the storage is away."}},
)
def readyz(response: Response, sessions: SessionsDep, storage: StorageDep, doorbell: DoorbellDep) -> Readiness:
    """Without database or storage nothing can be served; without the broker jobs are only found more slowly."""
    required = {"database": _check(lambda: ping(sessions)), "storage": _check(storage.ping)}
    broker = "ok" if doorbell.ping() else "away: jobs are found by looking, which is slower"
    checks = {**required, "broker": broker}
    if any(told != "ok" for told in required.values()):
        response.status_code = 503
        response.headers["Retry-After"] = "5"
        return Readiness(status="unavailable", checks=checks)
    return Readiness(status="ready" if broker == "ok" else "degraded", checks=checks)


def _check(ask: Callable[[], None]) -> str:
    try:
        ask()
    except ServiceError as error:
        return error.detail
    return "ok"
