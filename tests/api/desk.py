"""A front desk under test: a real uvicorn on a free port, an account with a key, and an HTTP client for it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
import uvicorn

from api.doorway import Doorway
from api.main import create_app
from shared import accounts, lifecycle, watchers
from shared.db import Sessions
from shared.ledger import Capacity, Claim, Stored
from shared.settings import Settings
from shared.storage import Storage

CAPABILITIES = (
    *("stage:export_onnx", "stage:quantize", "stage:build_engine", "engine:onnxruntime", "engine:openvino"),
    *("library:torchvision", "library:monai"),
)


@dataclass(frozen=True)
class Desk:
    """`client` speaks for `account_id`; the rest is what stands behind the desk."""

    url: str
    settings: Settings
    sessions: Sessions
    storage: Storage
    account_id: UUID
    key: str
    client: httpx.Client
    app: Any

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """POST any JSON, also such as no client of ours would send."""
        headers = {"Content-Type": "application/json", **headers}
        return self.client.post(path, content=json.dumps(body), headers=headers)

    def upload(self, content: bytes, format: str, name: str = "file") -> str:
        """Send a file all the way; returns its id."""
        begun = self.client.post("/v1/uploads", json=announce(content, format, name))
        assert begun.status_code in (200, 201), begun.text
        send(begun.json(), content)
        done = self.client.post(f"/v1/uploads/{begun.json()['id']}/complete")
        assert done.status_code == 200, done.text
        return str(done.json()["id"])

    def order(self, **changes: Any) -> dict[str, Any]:
        """A job's body whose files are uploaded and fit; `changes` replace parts of its recipe."""
        fitting = recipe(self.upload(weights(), "safetensors"), self.upload(data(), "safetensors"))
        return {"name": "unet", "recipe": {**fitting, **changes}}

    def submit(self, body: dict[str, Any] | None = None, *, key: str | None = None) -> dict[str, Any]:
        """Submit a job, with an idempotency key if one is given; returns it."""
        headers = {"Idempotency-Key": key} if key else {}
        answer = self.client.post("/v1/jobs", json=body or self.order(), headers=headers)
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def claim(self) -> Claim:
        """Take the next job as a worker would."""
        claimed = lifecycle.claim(self.sessions, Capacity("w1", ["default"], CAPABILITIES, 2**40), 60)
        assert claimed is not None
        watchers.tell(self.sessions, claimed.lease.job_id)
        return claimed

    def keep(self, role: str, name: str, content: bytes) -> Stored:
        """Put a job's file into storage; returns what the ledger is to be told of it."""
        sha256 = hashlib.sha256(content).hexdigest()
        key = f"jobs/test/{sha256}/{name}"
        etag = self.storage.put_bytes(content, key)
        return Stored(role, name, name.rpartition(".")[2], key, sha256, len(content), etag)

    def stranger(self) -> httpx.Client:
        """A client of another account."""
        account_id = accounts.ensure_account(self.sessions, "stranger")
        return client_of(self.url, accounts.create_key(self.sessions, account_id, "k"))


@contextmanager
def open_desk(settings: Settings, sessions: Sessions, storage: Storage) -> Iterator[Desk]:
    account_id = accounts.ensure_account(sessions, "ours")
    key = accounts.create_key(sessions, account_id, "k")
    with serving(create_app(settings)) as (url, app), client_of(url, key) as client:
        yield Desk(url, settings, sessions, storage, account_id, key, client, app)


@contextmanager
def serving(app: Any) -> Iterator[tuple[str, Any]]:
    """The app behind a uvicorn of its own, until the end."""
    listener = socket.create_server(("127.0.0.1", 0))
    options = {"log_level": "error", "access_log": False, "ws": "none", "timeout_graceful_shutdown": 1}
    config = uvicorn.Config(app, http=Doorway, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), name="desk")
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join(timeout=15)
        listener.close()
        assert not thread.is_alive(), "the desk did not close"


def client_of(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30, trust_env=False)


def wait_until(holds: Callable[[], bool], seconds: float = 10) -> None:
    """Look every few milliseconds until a condition holds; fails after `seconds`."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not holds():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        pause.wait(0.005)


# ---------------------------------------------------------------- files and bodies


def announce(content: bytes, format: str, name: str = "file") -> dict[str, Any]:
    """The body that announces a file."""
    sha256 = hashlib.sha256(content).hexdigest()
    return {"name": name, "format": format, "size_bytes": len(content), "sha256": sha256}


def send(upload: dict[str, Any], content: bytes) -> None:
    """PUT every part of an announced file."""
    for part in upload["parts"]:
        piece = content[part["offset"] : part["offset"] + part["size_bytes"]]
        httpx.put(part["url"], content=piece, trust_env=False).raise_for_status()


def safetensors(tensors: dict[str, tuple[str, list[int]]], width: int = 4) -> bytes:
    """A valid file of zeros, all of whose dtypes are `width` bytes wide."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = width
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def weights() -> bytes:
    return safetensors({"conv.weight": ("F32", [8, 1, 3, 3]), "conv.bias": ("F32", [8])})


def data(parts: tuple[str, ...] = ("calibration", "evaluation"), num_masks: int = 4) -> bytes:
    found = {}
    for part in parts:
        found[f"{part}.images"] = ("F32", [4, 1, 8, 8])
        found[f"{part}.masks"] = ("I32", [num_masks, 8, 8])
    return safetensors(found)


def recipe(weights_id: str, data_id: str) -> dict[str, Any]:
    return {
        "source": {"architecture": {"library": "monai", "name": "BasicUNet"}, "weights": weights_id},
        "task": {"kind": "segmentation", "classes": ["background", "brain"], "background": 0},
        "data": {"artifact": data_id},
        "stages": [{"kind": "export_onnx"}, {"kind": "quantize"}, {"kind": "build_engine"}],
    }
