"""The table at the end of a test run: each fault that was tried, and how it went.

`@pytest.mark.fault(number, what)` names a row of README.md; several tests may share one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import pytest

PROPERTY = "fault"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("fault"):
        item.user_properties.append((PROPERTY, (*marker.args[:2],)))  # travels with the reports, also between processes


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    outcomes: dict[tuple[int, str], list[str]] = defaultdict(list)
    seconds: dict[tuple[int, str], float] = defaultdict(float)
    for report in _reports(terminalreporter):
        for row in (tuple(value) for name, value in report.user_properties if name == PROPERTY):
            seconds[row] += report.duration
            if report.when == "call" or report.outcome != "passed":
                outcomes[row].append(report.outcome)
    if not outcomes:
        return
    terminalreporter.section("faults")
    for row in sorted(outcomes):
        number, what = row
        told = sorted(set(outcomes[row]), key=("failed", "skipped", "passed").index)
        tests = f"{len(outcomes[row])} tests" if len(outcomes[row]) > 1 else ""
        terminalreporter.line(f"{number:>3}  {told[0]:<8} {seconds[row]:>6.1f} s  {what}  {tests}".rstrip())


def _reports(terminalreporter: pytest.TerminalReporter) -> Iterator[pytest.TestReport]:
    for kept in terminalreporter.stats.values():
        yield from (report for report in kept if isinstance(report, pytest.TestReport))
