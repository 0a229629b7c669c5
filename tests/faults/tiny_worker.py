"""A worker as in production, whose jobs' processes are tiny_child.py's."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from worker import __main__ as production
from worker import process

process.PROGRAM = ("-P", str(Path(__file__).with_name("tiny_child.py")))

if __name__ == "__main__":
    sys.exit(production.main())
