# idunno/node/garbage.py: what stays until the process ends is not searched for garbage.
from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting() -> Iterator[None]:
    """Around the making of what stays (modules, a machine of a million files): it is not searched, neither now nor later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
