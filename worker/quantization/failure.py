"""A library's refusal to quantize, as the stage's own sentence."""

from __future__ import annotations

from shared.errors import StageFailed


def failed(scheme: str, error: Exception) -> StageFailed:
    """The library's first line behind ours."""
    lines = str(error).strip().splitlines()
    return StageFailed(
        f"The model cannot be quantized to {scheme}: {lines[0] if lines else type(error).__name__}",
        code="quantize_failed",
    )
