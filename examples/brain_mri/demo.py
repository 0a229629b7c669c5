"""The whole road on this machine: train a U-Net on a brain MRI, have it optimized by a local Burnish, look at it.

Every step is a command that you could have typed; each is printed before it runs. Ends with exit code 0 only if all
of them worked and the engine lies inside every goal: `met`, or `not_shown`, for 15 slices of one brain can show little.
Run by `make demo`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = HERE / "build"
RESULTS = ROOT / "build" / "demo"
SERVICE = RESULTS / "service"
BIN = Path(sys.executable).parent
GOOD = ("met", "not_shown")
JOB_IS_DONE_NOT_MET = 4  # exit code of `burnish wait`; the report says what it is in place of met
SLICE = BUILD / "slices" / "evaluation_09.npy"


def main() -> int:
    """Run the demo; returns the exit code."""
    begin = time.monotonic()
    RESULTS.mkdir(parents=True, exist_ok=True)
    try:
        start()
        python(HERE / "prepare.py", "--out", BUILD)
        python(HERE / "train.py", "--data", BUILD / "data.safetensors", "--out", BUILD / "unet.safetensors")
        job_id = submit()
        burnish("report", job_id, "--format", "md")
        report = json.loads(burnish("report", job_id, "--format", "json", capture=True))
        engine = download(job_id)
        mask = RESULTS / "engine_mask.png"
        burnish("predict", engine, SLICE, "--output", mask)
        picture = RESULTS / "brain_mri.png"
        python(HERE / "picture.py", "--slice", SLICE, "--engine-mask", mask, "--out", picture)
    except subprocess.CalledProcessError as error:
        print(f"\nThe demo stopped: that command ended with exit code {error.returncode}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    finally:
        burnish("local", "down", "--dir", SERVICE, check=False)
    print(f"\nverdict: {report['verdict'].replace('_', ' ')} ({report['reason']})")
    print(f"picture: {picture.relative_to(ROOT)}\nengine:  {engine.relative_to(ROOT)}")
    print(f"took {time.monotonic() - begin:.0f} s")
    return 0 if report["verdict"] in GOOD else 1


def start() -> None:
    """Start the local service on a free port, and have the commands that follow talk to it."""
    up = json.loads(burnish("local", "up", "--dir", SERVICE, "--port", "0", "--detach", "--json", capture=True))
    os.environ["BURNISH_URL"] = up["url"]
    os.environ["BURNISH_API_KEY"] = Path(up["api_key_path"]).read_text(encoding="utf-8").strip()
    print(up["url"])


def submit() -> str:
    """Upload the network and the data, submit the job, and watch it to its end; returns its id."""
    job = json.loads(burnish("submit", HERE / "job.yaml", "--json", capture=True))
    print(job["url"])
    burnish("wait", job["id"], accepted=(0, JOB_IS_DONE_NOT_MET))
    return str(job["id"])


def download(job_id: str) -> Path:
    """Fetch the engine into the results folder; returns its path."""
    told = json.loads(burnish("download", job_id, "--output", RESULTS, "--json", capture=True))
    return Path(told["path"])


def burnish(
    *arguments: object, capture: bool = False, check: bool = True, accepted: tuple[int, ...] = (0,)
) -> str:
    return run([BIN / "burnish", *arguments], capture=capture, check=check, accepted=accepted)


def python(*arguments: object) -> None:
    run([sys.executable, *arguments])


def run(
    command: list[object], *, capture: bool = False, check: bool = True, accepted: tuple[int, ...] = (0,)
) -> str:
    """Print a command, run it against the demo's own service, and return what it printed if that is captured.

    Raises subprocess.CalledProcessError where it ends with another code than those `accepted`.
    """
    words = [str(word) for word in command]
    shown = [os.path.relpath(word, ROOT) if word.startswith(str(ROOT)) else word for word in words]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    done = subprocess.run(words, check=False, text=True, stdout=subprocess.PIPE if capture else None, cwd=ROOT)
    if check and done.returncode not in accepted:
        done.check_returncode()
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
