"""Which failures of a job's process are its machine's and not the model's: another attempt may do better."""

from __future__ import annotations

import errno
from typing import Literal

MachineFault = Literal["out_of_memory", "device", "disk_full", "open_files"]
_NUMBERS: dict[int, MachineFault] = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EFBIG: "disk_full",
    errno.EMFILE: "open_files",
    errno.ENFILE: "open_files",
}

# How the numerical libraries word them; none has an exception class that another would share.
_WORDS: dict[MachineFault, tuple[str, ...]] = {
    "out_of_memory": ("out of memory", "can't allocate memory", "bad_alloc", "failed to allocate memory"),
    "device": ("CUDA error", "CUDA failure", "CUBLAS_STATUS", "CUDNN_STATUS", "device-side assert", "CUDA driver"),
}


def cause_of(error: BaseException) -> MachineFault | None:
    """What the machine lacked when this was raised; None if it is not known to be the machine's fault."""
    if isinstance(error, MemoryError):
        return "out_of_memory"
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        return _NUMBERS[error.errno]
    told = str(error)
    return next((cause for cause, words in _WORDS.items() if any(word in told for word in words)), None)
