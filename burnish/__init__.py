"""Burnish for its users: the Python client, the `burnish` command, and local mode."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burnish.client import Client, Job
    from burnish.errors import (
        BadInput,
        BrokenDownload,
        BurnishError,
        JobFailed,
        NoService,
        ServiceSaidNo,
        Unreachable,
    )

__all__ = [
    "Client",
    "Job",
    "BurnishError",
    "BadInput",
    "NoService",
    "Unreachable",
    "BrokenDownload",
    "ServiceSaidNo",
    "JobFailed",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for: the package itself stays cheap."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "burnish.client" if name in ("Client", "Job") else "burnish.errors"
    return getattr(importlib.import_module(module), name)
