"""What happens in a run of chaos, all of it drawn from one seed: who submits what, and what is killed, and when."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.faults.tiny_child import FORMATS

CALM_RATIO = 1 / 6  # of the run, at its beginning: what jobs take while nothing is killed
LAST_KILL_RATIO = 0.97

# What is killed, and how often in a minute of chaos; each at least once.
KILLS_A_MINUTE = {
    "child": 3.0,  # the job's process alone
    "supervisor": 2.0,  # the worker's process, whose holder ends the rest
    "tree": 1.5,  # a worker, its child and their holder
    "api": 1.5,
    "sweeper": 1.0,
    "valkey": 1.5,
    "postgres": 1.5,  # an immediate shutdown: no farewell, and a recovery
    "s3": 1.5,
}

ACCOUNTS = ("north", "east", "south", "west")
STAGES = (
    ("export_onnx", "build_engine"),
    ("export_onnx", "quantize", "build_engine"),
    ("prune", "export_onnx", "quantize", "build_engine"),
)
CANCELLED_RATIO = 0.06
EPOCH_SECONDS = 0.2


@dataclass(frozen=True)
class Kill:
    """`draw`, 0..1, chooses among those who could be meant."""

    at_seconds: float
    what: str
    draw: float


@dataclass(frozen=True)
class Errand:
    """A job to be submitted by an account, and cancelled a while after its acknowledgement if so."""

    number: int
    account: str
    at_seconds: float
    kinds: tuple[str, ...]
    script: str
    cancel_after_seconds: float | None = None

    @property
    def idempotency_key(self) -> str:
        return f"errand {self.number}"

    def result_names(self) -> list[str]:
        """The files that the job's stages leave."""
        return [f"{position}-{kind}.{FORMATS[kind]}" for position, kind in enumerate(self.kinds)]


@dataclass(frozen=True)
class Plan:
    seed: int
    seconds: float
    errands: list[Errand]
    kills: list[Kill]

    @property
    def calm_seconds(self) -> float:
        return self.seconds * CALM_RATIO


def plan(seed: int, seconds: float, num_jobs: int) -> Plan:
    """The same for the same seed, length and number of jobs."""
    return Plan(
        seed,
        seconds,
        errands=list(_errands(random.Random(f"errands {seed}"), seconds, num_jobs)),
        kills=list(_kills(random.Random(f"kills {seed}"), seconds)),
    )


def _errands(dice: random.Random, seconds: float, num_jobs: int) -> Iterator[Errand]:
    for number, at_seconds in enumerate(sorted(dice.uniform(0, seconds) for _ in range(num_jobs))):
        kinds = dice.choice(STAGES)
        trained, num_epochs = dice.randrange(len(kinds)), dice.randint(1, 6)
        is_cancelled = dice.random() < CANCELLED_RATIO
        yield Errand(
            number=number,
            account=dice.choice(ACCOUNTS),
            at_seconds=at_seconds,
            kinds=kinds,
            script=f"epochs {trained} {num_epochs} {EPOCH_SECONDS}",
            cancel_after_seconds=dice.uniform(0, 4) if is_cancelled else None,
        )


def _kills(dice: random.Random, seconds: float) -> Iterator[Kill]:
    first, last = seconds * CALM_RATIO, seconds * LAST_KILL_RATIO
    minutes = (last - first) / 60
    drawn = [
        (dice.uniform(first, last), what, dice.random())
        for what, rate in KILLS_A_MINUTE.items()
        for _ in range(max(1, round(rate * minutes)))
    ]
    yield from (Kill(*facts) for facts in sorted(drawn))
