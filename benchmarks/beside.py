"""The demo's job beside the same job of an earlier commit, on one machine in turns: `make bench-beside COMMIT=...`.

    python -m benchmarks.beside COMMIT [--pairs 3]

The earlier commit is checked out under build/beside, with the virtual environment's packages and its own code. Both
services run at once, each in local mode with its own example file, and take turns: while one works the other is idle.
The wall is from the command `burnish submit --wait` to its end, files uploaded beforehand, nothing taken from a cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.figures import percentile, spread

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "beside"
RESULTS = ROOT / "benchmarks" / "results" / "beside.md"
EXAMPLE = ROOT / "examples" / "brain_mri"
BAR = 0.6  # of the earlier commit's wall


@dataclass(frozen=True)
class Tree:
    """A checkout with the Python that sees its code, and the service that runs it."""

    name: str
    path: Path
    python: Path

    def burnish(self, *arguments: object, check: bool = True, variables: Mapping[str, str] | None = None) -> str:
        command = [str(self.python), "-m", "burnish", *map(str, arguments)]
        environment = {**os.environ, **(variables or {})}
        done = subprocess.run(command, cwd=self.path, check=check, text=True, stdout=subprocess.PIPE, env=environment)
        return done.stdout

    def up(self) -> dict[str, str]:
        """Start the service; returns the variables by which its commands find it."""
        directory = WORK / f"service-{self.name}"
        facts = json.loads(self.burnish("local", "up", "--dir", directory, "--port", "0", "--detach", "--json"))
        key = Path(facts["api_key_path"]).read_text(encoding="utf-8").strip()
        return {"BURNISH_URL": facts["url"], "BURNISH_API_KEY": key}

    def down(self) -> None:
        self.burnish("local", "down", "--dir", WORK / f"service-{self.name}", check=False)

    def job_file(self, weights: Path, data: Path) -> Path:
        """The tree's own example job, on files that both trees share, never from a cache."""
        document = yaml.safe_load((self.path / "examples/brain_mri/job.yaml").read_text(encoding="utf-8"))
        document["cache"] = False
        document["recipe"]["source"]["weights"] = str(weights)
        document["recipe"]["data"]["artifact"] = str(data)
        path = WORK / f"job-{self.name}.yaml"
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        return path

    def run(self, job: Path, variables: dict[str, str]) -> tuple[float, dict[str, Any]]:
        """Seconds of one job, and its report."""
        begin = time.monotonic()
        submitted = json.loads(self.burnish("submit", job, "--json", variables=variables))
        self.burnish("wait", submitted["id"], "--json", check=False, variables=variables)
        seconds = time.monotonic() - begin
        report = self.burnish("report", submitted["id"], "--format", "json", variables=variables)
        return seconds, json.loads(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    trees = [Tree("now", ROOT, Path(sys.executable)), checked_out(options.commit)]
    weights, data = _example()
    walls: dict[str, list[float]] = {tree.name: [] for tree in trees}
    verdicts = dict[str, str]()
    services = {}
    try:
        for tree in trees:
            services[tree.name] = tree.up()
        jobs = {tree.name: tree.job_file(weights, data) for tree in trees}
        for number in range(1 + options.pairs):  # the first of each brings libraries into the disk's cache
            for tree in trees if number % 2 == 0 else trees[::-1]:
                seconds, report = tree.run(jobs[tree.name], services[tree.name])
                verdicts[tree.name] = report["verdict"]
                print(f"{tree.name}: {seconds:.1f} s, {report['verdict']}", flush=True)
                if number:
                    walls[tree.name].append(seconds)
    finally:
        for tree in trees:
            tree.down()
    now, before = (walls[tree.name] for tree in trees)
    ratios = [one / other for one, other in zip(now, before, strict=True)]
    kept = percentile(ratios, 50) <= BAR
    RESULTS.write_text(_page(options, now, before, ratios, verdicts, kept), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))
    sys.exit(0 if kept else 1)


def checked_out(commit: str) -> Tree:
    """The commit's tree, with a Python that sees it before this one and shares the installed packages."""
    path = WORK / commit
    if not path.exists():
        subprocess.run(["git", "worktree", "add", "--detach", str(path), commit], cwd=ROOT, check=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path / ".venv")], check=True)
        site = Path(sysconfig.get_path("purelib", vars={"base": str(path / ".venv")}))
        (site / "tree.pth").write_text(f"{path}\n{sysconfig.get_path('purelib')}\n", encoding="utf-8")
        (path / ".venv" / "bin" / "weed").symlink_to(Path(sys.executable).with_name("weed"))  # a program, no module
    return Tree("before", path, path / ".venv" / "bin" / "python")


def _example() -> tuple[Path, Path]:
    """The example's data and its trained network, made once."""
    weights, data = WORK / "unet.safetensors", WORK / "data.safetensors"
    if not weights.exists():
        subprocess.run([sys.executable, str(EXAMPLE / "prepare.py"), "--out", str(WORK)], check=True)
        train = [sys.executable, str(EXAMPLE / "train.py"), "--data", str(data), "--out", str(weights)]
        subprocess.run(train, check=True)
    return weights, data


def _page(
    options: argparse.Namespace,
    now: list[float],
    before: list[float],
    ratios: list[float],
    verdicts: dict[str, str],
    kept: bool,
) -> str:
    return "\n".join(
        [
            "# The demo's job, beside the same job of an earlier commit",
            "",
            f"- earlier commit: {options.commit}",
            f"- {options.pairs} pairs in turns, after one of each that is not counted; load average now "
            f"{os.getloadavg()[0]:.1f}",
            f"- wall now: {spread(now, '.1f')} s, verdict {verdicts['now']}",
            f"- wall before: {spread(before, '.1f')} s, verdict {verdicts['before']}",
            f"- ratio of each pair: {spread(ratios, '.2f')}; bar {BAR}: {'kept' if kept else '**missed**'}",
            "",
        ]
    )


if __name__ == "__main__":
    main()
