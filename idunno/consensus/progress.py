# idunno/consensus/progress.py: what a leader knows of one follower's log, and how much it may send ahead.
#
# Rule 1: `match` only rises: the follower acknowledged that much, synced, in this term.
# Rule 2: `next` runs ahead of `match` by what is under way (pipelining, Raft thesis 10.2.1), within bounds; a rejection or a
#         gap brings it back, and until the place of agreement is found one append at a time is under way (probing).
from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from idunno.consensus.config import RaftConfig
from idunno.consensus.messages import AppendAnswer
from idunno.consensus.terms import Terms


@dataclass(slots=True)
class Progress:
    next: int
    match: int = 0
    unanswered: int = 0  # heartbeats since its last answer; counted, not timed, so that a pause of ours accuses nobody
    probing: bool = True
    probe_sent: bool = False
    round: int = 0  # the latest of the leader's rounds it answered
    silent: bool = False  # it copies the log and promises nothing: no majority counts it
    installing: bool = False  # the log no longer holds what it needs: it is sent a snapshot
    commit_sent: int = 0  # the highest commit index it can have taken from what was sent
    inflight: deque[tuple[int, int]] = field(default_factory=deque)  # (last index, bytes) of appends under way
    inflight_bytes: int = 0

    def may_send(self, config: RaftConfig) -> bool:
        if self.installing:
            return False
        if self.probing:
            return not self.probe_sent
        return len(self.inflight) < config.inflight_messages_max and self.inflight_bytes < config.inflight_bytes_max

    def sent(self, last: int, size: int) -> None:
        if self.probing:
            self.probe_sent = True
            return
        self.inflight.append((last, size))
        self.inflight_bytes += size
        self.next = last + 1

    def acknowledged(self, index: int) -> None:
        if index > self.match:
            self.match = index
        if self.probing:
            self._restart(probing=False)
        while self.inflight and self.inflight[0][0] <= self.match:
            self.inflight_bytes -= self.inflight.popleft()[1]
        if self.next <= self.match:
            self.next = self.match + 1

    def installed(self, index: int) -> None:
        """It has installed a snapshot, and has the log up to `index`."""
        self.installing = False
        self.acknowledged(index)

    def rejected(self, answer: AppendAnswer, terms: Terms) -> None:
        """Go back to where the logs may agree; a rejection that is older than what is known does nothing."""
        if answer.index <= self.match or (self.probing and answer.index != self.next - 1):
            return
        hint, _ = terms.last_agreeing(answer.hint_index, answer.hint_term)
        self._restart(probing=True)
        self.next = max(self.match + 1, min(int(answer.index), hint + 1))

    def _restart(self, *, probing: bool) -> None:
        self.probing, self.probe_sent = probing, False
        self.inflight.clear()
        self.inflight_bytes = 0
