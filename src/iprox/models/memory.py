"""Give freed memory back to the system."""

from __future__ import annotations

import ctypes
import sys

import torch

# Batches between two calls of `release_memory` in a loop. Calling it after every batch costs time on a tiny model, and
# the peak grows with the number between.
RELEASE_EVERY = 4


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the device or of the machine, did not suffice."""
    # torch's CPU allocator raises a plain RuntimeError, and so do CUDA's libraries of linear algebra.
    plain = ("can't allocate memory", "STATUS_ALLOC_FAILED", "(os error 12)")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in plain)


def release_memory() -> None:
    """Return the heap's free pages to the system, where the C library can (glibc).

    Every batch has another shape, so every tensor another size, and the holes that freed tensors leave are seldom
    reused: without this the resident memory of a long run on a CPU grows to several times what is in use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
