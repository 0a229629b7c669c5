"""Engines timed in turns, block by block, so that what else the machine does falls on all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import BaseModel

NUM_BLOCKS = 41
BLOCK_SECONDS = 0.04
LEAST_RUNS = 3
WARM_UP_SECONDS = 0.3
NUM_RESAMPLES = 2000

Blocks = list[list[float]]  # milliseconds of each run


class Ratio(BaseModel):
    """How many times faster one engine is than another, with a 95 % interval."""

    value: float
    low: float
    high: float


def time_in_turns(runs: Sequence[Callable[[], object]]) -> list[Blocks]:
    """Blocks of single runs for each of the callables; each round starts with another one."""
    counts = []
    for run in runs:
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < WARM_UP_SECONDS or count < LEAST_RUNS:
            run()
            count += 1
        counts.append(max(LEAST_RUNS, round(BLOCK_SECONDS / (time.perf_counter() - begin) * count)))
    blocks: list[Blocks] = [[] for _ in runs]
    gc.collect()
    gc.disable()
    try:
        for turn in range(NUM_BLOCKS):
            for index in range(len(runs)):
                chosen = (index + turn) % len(runs)
                runs[chosen]()  # brings its weights back into the caches
                blocks[chosen].append([_milliseconds(runs[chosen]) for _ in range(counts[chosen])])
    finally:
        gc.enable()
    return blocks


def _milliseconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - begin) / 1e6


def median_of(blocks: Blocks) -> float:
    """The median over the blocks of each block's median."""
    return float(np.median([np.median(block) for block in blocks]))


def ratio(before: Blocks, after: Blocks, seed: int = 0) -> Ratio:
    """The median of `before` over that of `after`; the interval is a bootstrap over the rounds, taken in pairs."""
    medians = np.array([[np.median(block) for block in blocks] for blocks in (before, after)])  # (2, rounds)
    chosen = np.random.default_rng(seed).integers(0, medians.shape[1], (NUM_RESAMPLES, medians.shape[1]))
    slow, fast = np.median(medians[:, chosen], axis=2)  # (resamples,) each
    low, high = np.percentile(slow / fast, (2.5, 97.5))
    return Ratio(value=median_of(before) / median_of(after), low=float(low), high=float(high))
