"""What the service says of itself: its stages, targets, workers and version, and whether it is well."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
from sqlalchemy import text

from shared import workers
from shared.db import Sessions, transaction
from shared.recipe import stage_kinds
from shared.settings import Settings
from shared.storage import Storage
from shared.workers import Registration
from tests.api.desk import CAPABILITIES, Desk, open_desk, wait_until


def test_the_stages_are_those_of_the_language_with_their_defaults(desk: Desk) -> None:
    stages = {stage["kind"]: stage for stage in desk.client.get("/v1/stages").json()}
    assert set(stages) == set(stage_kinds())
    quantize = stages["quantize"]
    assert (quantize["consumes"], quantize["produces"]) == ("onnx", "onnx")
    assert quantize["json_schema"]["properties"]["calibration_samples"]["default"] == 128
    assert all(stage["description"] for stage in stages.values())


def test_the_targets_say_how_many_workers_can_build_them(desk: Desk) -> None:
    one_engine = [name for name in CAPABILITIES if name != "engine:openvino"]
    for name, capabilities in (("both", CAPABILITIES), ("one", one_engine)):
        workers.register(desk.sessions, _registration(name, capabilities))
    targets = {target["name"]: target["workers"] for target in desk.client.get("/v1/targets").json()}
    assert {name: targets[name] for name in ("onnxruntime", "openvino", "cpu-fastest", "tensorrt")} == {
        "onnxruntime": 2, "openvino": 1, "cpu-fastest": 1, "tensorrt": 0
    }  # fmt: skip
    assert targets["tensorrt-rtx-8.9"] == 0


def test_the_workers_say_whether_they_are_alive_and_busy(desk: Desk) -> None:
    for name in ("busy", "dead", "idle"):
        workers.register(desk.sessions, _registration(name, CAPABILITIES))
    job = desk.submit()
    workers.beat(desk.sessions, "busy", job["id"])
    with transaction(desk.sessions) as session:
        session.execute(text("UPDATE workers SET heartbeat_at = now() - interval '1 hour' WHERE id = 'dead'"))
    found = [(w["id"], w["alive"], w["busy"]) for w in desk.client.get("/v1/workers").json()]
    assert found == [("busy", True, True), ("dead", False, False), ("idle", True, False)]


def test_the_version_is_that_of_the_package(desk: Desk) -> None:
    assert desk.client.get("/v1/version").json() == {"version": version("burnish"), "api": "v1"}


def test_a_service_that_has_everything_is_ready(desk: Desk) -> None:
    answer = desk.client.get("/readyz")
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "ready", "checks": {"database": "ok", "storage": "ok", "broker": "ok"}},
    )


NOBODY = "127.0.0.1:9"


@pytest.mark.parametrize(
    ("gone", "status", "told"),
    [
        ({"broker_url": f"redis://{NOBODY}/0"}, 200, "degraded"),
        ({"database_url": f"postgresql+psycopg://burnish@{NOBODY}/burnish"}, 503, "unavailable"),
        ({"s3_endpoint_url": f"http://{NOBODY}"}, 503, "unavailable"),
    ],
    ids=["broker", "database", "storage"],
)
def test_a_service_that_lacks_a_server_says_which(
    settings: Settings, sessions: Sessions, storage: Storage, gone: dict[str, Any], status: int, told: str
) -> None:
    with open_desk(settings.model_copy(update=gone), sessions, storage) as desk:
        answer = desk.client.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (status, told)
        assert [name for name, state in answer.json()["checks"].items() if state != "ok"] == [_server(gone)]
        assert desk.client.get("/healthz").json() == {"status": "ok"}
        assert (answer.headers.get("Retry-After") == "5") == (status == 503)


def test_a_database_that_is_away_is_503_with_a_time_to_come_back(
    settings: Settings, sessions: Sessions, storage: Storage
) -> None:
    gone = {"database_url": f"postgresql+psycopg://burnish@{NOBODY}/burnish"}
    with open_desk(settings.model_copy(update=gone), sessions, storage) as desk:
        answer = desk.client.get("/v1/jobs")
        problem = answer.json()
        assert (answer.status_code, problem["code"], problem["fault"]) == (503, "database_unavailable", "platform")
        assert (problem["retryable"], answer.headers["Retry-After"]) == (True, "2")
        assert NOBODY not in answer.text


def test_connections_that_are_cut_cost_a_503_at_most_and_the_desk_recovers(desk: Desk) -> None:
    job = desk.submit()
    for _ in range(3):
        with transaction(desk.sessions) as session:
            others = "datname = current_database() AND pid <> pg_backend_pid()"
            session.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))
        first = desk.client.get(job["url"])
        assert first.status_code in (200, 503)
        if first.status_code == 503:
            assert first.json()["code"] in ("database_unavailable", "commit_unknown")
            assert first.headers["Retry-After"] == "2"
        wait_until(lambda: desk.client.get(job["url"]).status_code == 200)


def test_a_bug_is_a_500_with_a_number_and_no_trace(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    with transaction(desk.sessions) as session:
        session.execute(text("ALTER TABLE workers RENAME TO labourers"))
        session.execute(text("CREATE VIEW workers AS SELECT * FROM labourers WHERE 1 / 0 = 1"))
    answer = desk.client.get("/v1/workers")
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (500, "internal_error")
    assert answer.headers["Content-Type"] == "application/problem+json"
    number = problem["detail"].rpartition(" ")[2].rstrip(".")
    assert "labourers" not in answer.text
    assert "Traceback" not in answer.text
    (logged,) = (record for record in caplog.records if record.getMessage() == "unexpected")
    assert vars(logged)["facts"]["error_id"] == number
    assert logged.exc_info is not None
    assert "DivisionByZero" in str(logged.exc_info[1])


def test_the_front_desk_never_loads_a_numerical_library() -> None:
    barred = ("torch", "numpy", "onnx", "onnxruntime", "openvino", "tensorrt", "scipy", "monai")
    program = f"""
import sys
for name in {barred!r}:
    sys.modules[name] = None
import api.main
api.main.create_app(api.main.Settings(local=True)).openapi()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def _registration(name: str, capabilities: Any) -> Registration:
    return Registration(name, "host", ["default"], list(capabilities), 2, 2**40, {"cpu": "test"})


def _server(gone: dict[str, Any]) -> str:
    (name,) = gone
    return {"broker_url": "broker", "database_url": "database", "s3_endpoint_url": "storage"}[name]


