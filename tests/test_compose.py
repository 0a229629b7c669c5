"""The production set-up, as Docker Compose itself reads it: no engine is needed to check a configuration."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from shared.settings import Settings

ROOT = Path(__file__).parents[1]
COMPOSE = Path(sys.executable).with_name("docker-compose")
SECRETS = (
    "POSTGRES_PASSWORD",
    "VALKEY_PASSWORD",
    "BURNISH_S3_ACCESS_KEY",
    "BURNISH_S3_SECRET_KEY",
    "BURNISH_SECRET_KEY",
)
OURS = ("migrate", "bucket", "api", "sweeper", "worker-cpu", "worker-gpu")
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def _config(env_file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(COMPOSE), "--env-file", str(env_file), "--profile", "gpu", "config", *arguments]
    bare = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    done = _config(ROOT / ".env.example", "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["services"]
    assert isinstance(found, dict)
    return found


def test_the_configuration_is_valid_with_the_example_environment() -> None:
    done = _config(ROOT / ".env.example", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("missing", SECRETS)
def test_without_any_one_secret_nothing_starts(missing: str, tmp_path: Path) -> None:
    kept = [line for line in (ROOT / ".env.example").read_text().splitlines() if not line.startswith(f"{missing}=")]
    for lines in (kept, [*kept, f"{missing}="]):
        (tmp_path / "env").write_text("\n".join(lines))
        done = _config(tmp_path / "env", "--quiet")
        assert done.returncode != 0
        assert f"required variable {missing} is missing a value: set it in .env" in done.stderr


def test_the_services_of_the_house_are_all_there(services: dict[str, Any]) -> None:
    assert set(services) == {"postgres", "valkey", "s3", *OURS}


def test_the_settings_refuse_the_examples_secrets(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was copied and never changed must not go into production."""
    environment = services["api"]["environment"]
    for name in [name for name in os.environ if name.startswith("BURNISH_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    good = {
        "BURNISH_SECRET_KEY": "a",
        "BURNISH_S3_SECRET_KEY": "b",
        "BURNISH_DATABASE_URL": "postgresql+psycopg://burnish:c@postgres:5432/burnish",
        "BURNISH_BROKER_URL": "redis://:d@valkey:6379/0",
    }
    for name in good:
        for other, value in good.items():
            monkeypatch.setenv(other, environment[other] if other == name else value)
        with pytest.raises(ValidationError, match=f"set {name}"):
            Settings()
    monkeypatch.setenv(name, good[name])
    assert Settings().s3_endpoint_url == "http://s3:8333"


@pytest.mark.parametrize("service", OURS)
def test_every_setting_given_is_one_that_the_service_has(services: dict[str, Any], service: str) -> None:
    known = {f"BURNISH_{name.upper()}" for name in Settings.model_fields}
    assert set(services[service]["environment"]) <= known


def test_whoever_is_waited_for_says_when_it_is_ready(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for awaited, how in service.get("depends_on", {}).items():
            other = services[awaited]
            if how["condition"] == "service_healthy":
                assert other["healthcheck"]["test"], f"{name} waits for {awaited}"
            else:
                assert how["condition"] == "service_completed_successfully"
                assert other["restart"].startswith("on-failure"), f"{awaited} has to end"


def test_whoever_runs_the_ledger_waits_for_the_migrations(services: dict[str, Any]) -> None:
    for name in ("api", "sweeper", "worker-cpu", "worker-gpu"):
        assert services[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
        assert services[name]["depends_on"]["bucket"]["condition"] == "service_completed_successfully"
        assert services[name]["restart"] == "unless-stopped"
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"


def test_every_image_is_pinned(services: dict[str, Any]) -> None:
    images = [service["image"] for service in services.values()]
    for path in DOCKERFILES:
        images += re.findall(r"^FROM (\S+)", path.read_text(), re.MULTILINE)
        images += [image for image in re.findall(r"--from=(\S+)", path.read_text()) if image != "built"]
    for image in images:
        _, _, tag = image.partition(":")
        assert re.match(r"\d+\.\d+", tag), f"{image} is not pinned"


def test_every_command_exists(services: dict[str, Any]) -> None:
    commands = [services[name]["command"] for name in OURS]
    for command in commands:
        match command:
            case ["python", "-m", module]:
                assert importlib.util.find_spec(module) is not None, module
            case ["python", "-c", program]:
                compile(program, "docker-compose.yml", "exec")
                for module in re.findall(r"from (\S+) import", program):
                    assert importlib.util.find_spec(module) is not None, module
            case ["uvicorn", "--factory", target, "--host", "0.0.0.0", "--port", "8000", *_]:
                module, _, name = target.partition(":")
                assert callable(getattr(importlib.import_module(module), name))
            case ["alembic", "-c", path, "upgrade", "head"]:
                assert (ROOT / path).is_file()
            case _:
                pytest.fail(f"what is {command}?")


def test_only_the_loopback_is_bound_unless_asked(services: dict[str, Any], tmp_path: Path) -> None:
    published = {name: port for name, service in services.items() for port in service.get("ports", [])}
    assert {name: port["host_ip"] for name, port in published.items()} == {"api": "127.0.0.1", "s3": "127.0.0.1"}
    (tmp_path / "env").write_text((ROOT / ".env.example").read_text() + "\nBURNISH_API_BIND=0.0.0.0:80\n")
    done = _config(tmp_path / "env", "--format", "json")
    [port] = json.loads(done.stdout)["services"]["api"]["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("0.0.0.0", "80", 8000)


def test_the_workshop_has_no_way_out_and_nothing_to_escalate(services: dict[str, Any]) -> None:
    for name in ("migrate", "bucket", "sweeper", "worker-cpu", "worker-gpu", "postgres", "valkey"):
        assert set(services[name]["networks"]) == {"inside"}
    done = _config(ROOT / ".env.example", "--format", "json")
    assert json.loads(done.stdout)["networks"]["inside"]["internal"] is True
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        if name in OURS:
            assert service["cap_drop"] == ["ALL"], name
            assert service["init"] is True, name


def test_a_worker_is_given_time_to_drain_and_limits_that_it_knows_of(services: dict[str, Any]) -> None:
    for name in ("worker-cpu", "worker-gpu"):
        worker, limits = services[name], services[name]["deploy"]["resources"]["limits"]
        assert worker["stop_grace_period"] == "1m30s"
        assert Settings(local=True).drain_seconds < 60
        assert int(worker["environment"]["BURNISH_WORKER_MEMORY_BYTES"]) == int(limits["memory"])
        assert float(worker["environment"]["BURNISH_WORKER_THREADS"]) == float(limits["cpus"])
        assert json.loads(worker["environment"]["BURNISH_WORKER_QUEUES"])[0] == "default"
    [device] = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert services["worker-gpu"]["profiles"] == ["gpu"]


def test_every_lasting_service_has_limits(services: dict[str, Any]) -> None:
    for name, service in services.items():
        if name not in ("migrate", "bucket"):
            assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"]), name


def test_data_lies_in_volumes(services: dict[str, Any]) -> None:
    kept = {"postgres": "/var/lib/postgresql", "valkey": "/data", "s3": "/data"}
    for name, target in kept.items():
        [volume] = services[name]["volumes"]
        assert (volume["type"], volume["source"], volume["target"]) == ("volume", name, target)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_special_and_holds_no_secret(path: Path) -> None:
    text = path.read_text()
    final = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER 10001$", final, re.MULTILINE)
    assert final.index("USER 10001") < final.index("CMD ")
    assert "COPY . ." not in final
    assert not re.search(r"(?i)(password|secret|token|api_key)", text)
    assert "--constraint constraints.txt" in text


def test_each_image_is_built_from_its_own_file_with_its_own_extras(services: dict[str, Any]) -> None:
    for service, extras in (("api", "api"), ("worker-cpu", "worker"), ("worker-gpu", "worker,gpu")):
        path = ROOT / services[service]["build"]["dockerfile"]
        assert f'".[{extras}]"' in path.read_text()
    assert {path.name.removeprefix("Dockerfile.") for path in DOCKERFILES} == {"api", "worker-cpu", "worker-gpu"}


def test_only_what_is_installed_reaches_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:].rstrip("/") for line in lines if line.startswith("!")}
    assert "*" in lines
    rooms = {"api", "burnish", "migrations", "shared", "worker"}
    assert allowed == {"pyproject.toml", "constraints.txt", "README.md", *rooms}
