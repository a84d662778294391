"""Exchange two directories in one step, where the system can: Linux's renameat2, macOS's renamex_np."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

SWAP = 2  # RENAME_EXCHANGE and RENAME_SWAP are the same number
HERE = -100  # AT_FDCWD of Linux: relative paths start at the working directory


def exchange(first: Path, second: Path) -> bool:
    """Let two paths change places. False where that cannot be done here; then nothing has changed."""
    one, two = os.fsencode(first), os.fsencode(second)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = library.renamex_np(one, two, SWAP)
        else:
            failed = library.renameat2(HERE, one, HERE, two, SWAP)
    except (AttributeError, OSError):  # a C library without it
        return False
    return not failed
