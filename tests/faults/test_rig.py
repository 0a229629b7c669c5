"""The rig itself: fault points that are free until they are armed, and a proxy that is the network it is told to be."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import faultpoints
from tests.faults.ground import HERE, Ground, reached, wait_until
from tests.faults.proxy import Proxy

ROW = re.compile(r"^\| ([0-9]+)(?:, ([0-9]+))? \|", re.MULTILINE)
MARKED = re.compile(r"mark\.fault\(\s*([0-9]+)")
REACH_TWICE = "from shared.faultpoints import reach; reach('here'); print('once', flush=True); reach('here'); print(2)"


def test_every_row_of_the_page_has_a_test_and_every_test_its_row() -> None:
    rows = {int(number) for found in ROW.findall((HERE / "README.md").read_text()) for number in found if number}
    marked = {int(number) for file in HERE.parent.rglob("*.py") for number in MARKED.findall(file.read_text())}
    assert marked == rows
    assert len(rows) >= 50


def run(faults: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHONPATH": str(Path.cwd()), faultpoints.VARIABLE: faults}
    return subprocess.run([sys.executable, "-c", REACH_TWICE], env=given, capture_output=True, text=True, check=False)


def test_a_line_that_is_not_armed_does_nothing() -> None:
    assert faultpoints.reach("anything") is None
    assert faultpoints.reach.__name__ == "_nothing"
    assert run("there=kill").stdout == "once\n2\n"


@pytest.mark.parametrize(
    ("deed", "code", "told"),
    [
        ("kill", -signal.SIGKILL, ""),
        ("exit", faultpoints.EXIT_CODE, ""),
        ("raise", 1, ""),
        ("kill@2", -signal.SIGKILL, "once\n"),
        ("kill@3", 0, "once\n2\n"),
    ],
)
def test_an_armed_line_does_what_it_was_armed_with(deed: str, code: int, told: str) -> None:
    done = run(f"there=exit,here={deed}")
    assert (done.returncode, done.stdout) == (code, told), done.stderr


def test_a_process_waits_at_a_line_until_it_is_let_go(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", REACH_TWICE],
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), faultpoints.VARIABLE: f"here=wait:{tmp_path / 'gate'}"},
    ) as process:
        gate = reached(tmp_path / "gate")
        assert process.poll() is None
        gate.unlink()
        assert process.wait(timeout=10) == 0


def test_a_tiny_job_takes_the_real_road(ground: Ground) -> None:
    job_id = ground.submit("epochs 0 2")
    assert ground.work() == "succeeded", ground.reason(job_id)
    assert sorted(ground.result(job_id)) == ["0-quantize.onnx", "1-build_engine.engine"]
    assert ground.faultless_result() == ground.faultless_result()
    assert ground.faultless_result() != ground.result(job_id)


def test_a_worker_process_runs_tiny_jobs(ground: Ground) -> None:
    ground.start_worker()
    job_id = ground.submit()
    assert ground.wait_for(job_id).status == "succeeded"


# ---------------------------------------------------------------- the proxy


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that gives back what it gets."""

    def serve(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(2**16):
                connection.sendall(data)

    def listen(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=listen, args=(server,))
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    with Proxy(echo) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def is_cut(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_it_passes_bytes_on_late_and_slowly(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"at once")
        assert connection.recv(100) == b"at once"
        for tell in (lambda: proxy.delay(0.1), lambda: proxy.throttle(100)):
            proxy.heal()
            tell()
            started_at = time.monotonic()
            connection.sendall(b"later    .")
            assert connection.recv(100) == b"later    ."
            assert time.monotonic() - started_at > 0.19


def test_it_cuts_after_so_many_bytes_and_then_heals(proxy: Proxy) -> None:
    proxy.cut_after(5)
    with connect(proxy) as connection:
        connection.sendall(b"12345")
        assert is_cut(connection)
    with connect(proxy) as connection:
        connection.sendall(b"12345")
        assert connection.recv(100) == b"12345"
        proxy.cut()
        assert is_cut(connection)


def test_a_blackhole_keeps_everything_until_it_heals(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.settimeout(0.1)
        proxy.blackhole()
        connection.sendall(b"kept")
        with pytest.raises(TimeoutError):
            connection.recv(100)
        proxy.heal()
        connection.settimeout(5)
        assert connection.recv(100) == b"kept"


def test_an_answer_is_lost_after_its_request_has_arrived(proxy: Proxy) -> None:
    proxy.lose_answer(b"COMMIT")
    with connect(proxy) as connection:
        connection.sendall(b"SELECT 1")
        assert connection.recv(100) == b"SELECT 1"
        connection.sendall(b"COMMIT")
        assert is_cut(connection)
    assert proxy.num_answers_lost == 1


def test_it_is_down_and_up_again_on_the_same_port(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"up")
        assert connection.recv(100) == b"up"
        proxy.refuse()
        assert is_cut(connection)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.accept()
    with wait_until(lambda: connect(proxy), "a connection") as connection:
        connection.sendall(b"up")
        assert connection.recv(100) == b"up"
