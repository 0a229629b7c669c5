"""Which failures are the machine's: another attempt may do better, and the model is not blamed."""

from __future__ import annotations

import errno

import pytest
import torch

from worker.causes import MachineFault, cause_of


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), "out_of_memory"),
        (RuntimeError("std::bad_alloc"), "out_of_memory"),
        (RuntimeError("CUDA error: out of memory"), "out_of_memory"),
        (RuntimeError("CUDA error: device-side assert triggered"), "device"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), "device"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (OSError(errno.EFBIG, "File too large"), "disk_full"),
        (OSError(errno.EMFILE, "Too many open files"), "open_files"),
        (OSError(errno.EACCES, "Permission denied"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (KeyError("conv1"), None),
    ],
)
def test_a_failure_is_put_down_to_its_cause(error: Exception, cause: MachineFault | None) -> None:
    assert cause_of(error) == cause


def test_what_the_allocator_of_this_torch_says_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55, dtype=torch.uint8)
    assert cause_of(raised.value) == "out_of_memory"
