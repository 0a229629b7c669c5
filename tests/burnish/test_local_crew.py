"""The crew: services start in order and side by side, are restarted when they die, and stop in order."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from burnish.local import crew
from burnish.local.crew import Crew, Service
from burnish.local.place import LocalFailed, Place
from burnish.local.waiting import wait_until


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "place")
    place.make()
    return place


def service(place: Place, name: str, script: str, after: tuple[str, ...] = (), **options: object) -> Service:
    """A shell script as a service; `$DONE` is a file for it to write, by which it is ready."""
    done = place.work / name
    ready: Callable[[], bool] = done.exists
    return Service(
        name=name,
        command=["sh", "-c", script],
        directory=place.work,
        environment={"DONE": str(done)},
        after=after,
        **{"ready": ready, "grace_seconds": 5.0, **options},  # type: ignore[arg-type]
    )


def leash_of(crew: Crew, name: str) -> psutil.Process:
    pid = crew.states()[name].pid
    assert pid is not None
    return psutil.Process(pid)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_service_starts_when_those_it_needs_are_ready(place: Place) -> None:
    first = service(place, "first", "sleep 0.2; touch $DONE; exec sleep 100")
    second = service(place, "second", "test -e first && touch $DONE; exec sleep 100", after=("first",))
    with Crew(place, [second, first]) as crew:
        crew.start()
        crew.wait_ready()
        assert {state.phase for state in crew.states().values()} == {"ready"}


def test_services_that_do_not_need_each_other_start_side_by_side(place: Place) -> None:
    meet = "touch $DONE.here; until test -e {}.here; do sleep 0.01; done; touch $DONE; exec sleep 100"
    left, right = service(place, "left", meet.format("right")), service(place, "right", meet.format("left"))
    with Crew(place, [left, right]) as crew:
        crew.start()
        crew.wait_ready()


def test_what_runs_once_is_done_before_the_next_begins(place: Place) -> None:
    once = service(place, "once", "sleep 0.2; touch $DONE", once=True)
    then = service(place, "then", "test -e once && touch $DONE; exec sleep 100", after=("once",))
    with Crew(place, [once, then]) as crew:
        crew.start()
        crew.wait_ready()
        states = crew.states()
        assert (states["once"].phase, states["once"].pid, states["then"].phase) == ("done", None, "ready")


@pytest.mark.parametrize("once", [True, False])
def test_a_service_that_dies_at_the_start_is_told_with_the_end_of_its_log(place: Place, once: bool) -> None:
    bad = service(place, "bad", "echo first; echo this is why; exit 9", once=once)
    good = service(place, "good", "touch $DONE; exec sleep 100")
    with Crew(place, [bad, good]) as crew:
        crew.start()
        with pytest.raises(LocalFailed, match=r"(?s)bad ended with status 9\. .*bad\.log:\nfirst\nthis is why$"):
            crew.wait_ready()
        assert crew.failed() == "bad"
    assert crew.states()["good"].phase == "stopped"


def test_a_service_that_is_never_ready_is_given_up(place: Place) -> None:
    slow = service(place, "slow", "exec sleep 100", start_seconds=0.3)
    with Crew(place, [slow]) as crew:
        crew.start()
        with pytest.raises(LocalFailed, match="slow ended with status"):
            crew.wait_ready()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_the_question_whether_it_is_ready_ends_the_start(place: Place) -> None:
    def broken() -> bool:
        raise ZeroDivisionError

    with Crew(place, [service(place, "asked", "exec sleep 100", ready=broken)]) as crew:
        crew.start()
        with pytest.raises(LocalFailed, match="asked is not ready"):
            crew.wait_ready()


def test_a_service_that_dies_is_started_again_and_it_is_said(place: Place) -> None:
    with Crew(place, [service(place, "mortal", "touch $DONE; exec sleep 100")]) as crew:
        crew.start()
        crew.wait_ready()
        (command,) = leash_of(crew, "mortal").children()
        command.kill()
        assert wait_until(lambda: crew.states()["mortal"].restarts == 1 and crew.is_ready(), 10)
        assert crew.states()["mortal"].last_exit == 128 + signal.SIGKILL
        # Its first life left $DONE, so it counts as ready before its leash has started it.
        assert wait_until(lambda: bool(leash_of(crew, "mortal").children()), 10)
        (again,) = leash_of(crew, "mortal").children()
        assert again.pid != command.pid


def test_a_service_whose_leash_is_killed_is_started_again(place: Place) -> None:
    with Crew(place, [service(place, "mortal", "touch $DONE; exec sleep 100")]) as crew:
        crew.start()
        crew.wait_ready()
        leash = leash_of(crew, "mortal")
        (command,) = leash.children()
        leash.kill()
        assert wait_until(lambda: crew.states()["mortal"].restarts == 1 and crew.is_ready(), 10)
        assert wait_until(lambda: is_gone(command), 5)


def test_restarts_come_slower_and_slower(place: Place) -> None:
    begun = place.work / "begun"
    dying = service(place, "dying", "date +%s.%N >> begun; touch $DONE; sleep 0.1; exit 1")
    with Crew(place, [dying]) as crew:
        crew.start()
        assert wait_until(lambda: crew.states()["dying"].restarts >= 3, 20)
        assert wait_until(lambda: len(begun.read_text().split()) >= 4, 5)
    instants = [float(instant) for instant in begun.read_text().split()[:4]]
    first, second, third = (after - before for before, after in itertools.pairwise(instants))
    assert first < second < third


def test_who_lived_long_is_forgiven_its_short_lives(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "STEADY_SECONDS", 1.0)
    begun = place.work / "begun"
    lives = "date +%s.%N >> begun; touch $DONE; sleep 0.1; test $(wc -l < begun) = 3 && sleep 1; exit 1"
    with Crew(place, [service(place, "dying", lives)]) as running:
        running.start()
        assert wait_until(lambda: begun.exists() and len(begun.read_text().split()) >= 5, 20)
    instants = [float(instant) for instant in begun.read_text().split()[:5]]
    _, second, _, after_a_long_life = (after - before for before, after in itertools.pairwise(instants))
    assert after_a_long_life < second + 1  # and not four times as long


def test_who_needs_another_stops_before_it(place: Place) -> None:
    below = service(place, "below", "trap 'echo below >> order; exit' TERM; touch $DONE; while :; do sleep 0.05; done")
    above = service(
        place,
        "above",
        "trap 'sleep 0.3; echo above >> order; exit' TERM; touch $DONE; while :; do sleep 0.05; done",
        after=("below",),
    )
    with Crew(place, [below, above]) as crew:
        crew.start()
        crew.wait_ready()
        crew.stop()
        assert (place.work / "order").read_text().split() == ["above", "below"]
        assert {state.phase for state in crew.states().values()} == {"stopped"}


def test_a_crew_can_be_stopped_while_it_starts(place: Place) -> None:
    first = service(place, "first", "exec sleep 100")
    second = service(place, "second", "exec sleep 100", after=("first",))
    begun = time.monotonic()
    with Crew(place, [first, second]) as crew:
        crew.start()
        assert wait_until(lambda: crew.states()["first"].phase == "starting", 5)
        crew.stop()
        assert {state.phase for state in crew.states().values()} == {"stopped"}
    assert time.monotonic() - begun < 5


def test_letting_go_kills_at_once(place: Place) -> None:
    stubborn = service(place, "stubborn", "trap '' TERM; touch $DONE; while :; do sleep 0.05; done", grace_seconds=100)
    with Crew(place, [stubborn]) as crew:
        crew.start()
        crew.wait_ready()
        leash = leash_of(crew, "stubborn")
        crew.kill()
    assert is_gone(leash)


def test_each_start_begins_a_new_log_and_keeps_the_one_before(place: Place) -> None:
    for text in ("one", "two"):
        (place.work / "talker").unlink(missing_ok=True)
        with Crew(place, [service(place, "talker", f"echo {text}; touch $DONE; exec sleep 100")]) as crew:
            crew.start()
            crew.wait_ready()
    assert (place.logs / "talker.log").read_text() == "two\n"
    assert (place.logs / "talker.log.old").read_text() == "one\n"


def test_a_service_sees_its_own_environment_on_top_of_ours(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "ours")
    monkeypatch.setenv("DONE", "not this")
    with Crew(place, [service(place, "shown", "echo $OURS $DONE; touch $DONE; exec sleep 100")]) as crew:
        crew.start()
        crew.wait_ready()
    assert (place.logs / "shown.log").read_text() == f"ours {place.work / 'shown'}\n"


def test_changes_are_told(place: Place) -> None:
    told: list[None] = []
    with Crew(
        place,
        [service(place, "seen", "touch $DONE; exec sleep 100")],
        changed=lambda: told.append(None),
    ) as crew:
        crew.start()
        crew.wait_ready()
    assert len(told) == 3  # starting, ready, stopped


def test_nothing_is_left_open(place: Place) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before, children = descriptors(), psutil.Process().children()
    with Crew(place, [service(place, "one", "touch $DONE; exec sleep 100")]) as crew:
        crew.start()
        crew.wait_ready()
    assert descriptors() == before
    assert psutil.Process().children() == children
