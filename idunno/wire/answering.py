# idunno/wire/answering.py: how long a handler may work, so that its caller hears from it why it did not come to an end.
from __future__ import annotations

from typing import Any, Final

from idunno.wire.calls import Call

MARGIN_S: Final = 0.2
"""Kept of the caller's time, so that an error about it still gets back."""


def left_s(call: Call[Any]) -> float:
    """Time that a handler may spend, in seconds."""
    return max(0.05, call.remaining_s() - MARGIN_S)
