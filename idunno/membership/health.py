# idunno/membership/health.py: how much this node may trust itself, and how long a suspect has.
#
# Rule 1: (LHA-Probe) what speaks against this node raises its score: a probe for which not even a helper said a word, a
#         suspicion of itself that it had to refute, an own timer that fired late. An answer lowers it.
# Rule 2: the score stretches this node's own probes, never the others': an ill node accuses slowly, a dead one is still
#         accused quickly by the well.
# Rule 3: (LHA-Suspicion) the more members accuse independently, the shorter a suspect's time.
#
# Source: Lifeguard (arXiv 1707.00788), sections III.A and III.B. Unlike the paper a failed probe by itself does not raise
# the score, nor does a single missing nack: three members that die together would slow down those who must notice it.
from __future__ import annotations

from math import log
from typing import Final

SCORE_MAX: Final = 8
"""S in the paper. A probe then takes nine times as long."""


class LocalHealth:
    def __init__(self) -> None:
        self.score = 0

    @property
    def stretch(self) -> int:
        """By what a probe's times are multiplied."""
        return self.score + 1

    def worse(self) -> None:
        self.score = min(SCORE_MAX, self.score + 1)

    def better(self) -> None:
        self.score = max(0, self.score - 1)


def suspicion_ms(min_ms: int, max_ms: int, confirmations: int, wanted: int) -> int:
    """How long a suspect may defend itself when `confirmations` members accuse it besides the first.

    max(Min, Max - (Max - Min) * log(C + 1) / log(K + 1)), K = `wanted` confirmations for the shortest time.
    """
    return max(min_ms, round(max_ms - (max_ms - min_ms) * log(confirmations + 1) / log(wanted + 1)))
