from __future__ import annotations

from idunno.base.ids import NodeId
from idunno.coordinator.records import NodeRecord
from idunno.membership.events import MemberView
from idunno.scheduler.presence import STEADY_MS, UNSEEN_MS, Presence

ME, OTHER = NodeId("n1"), NodeId("n2")


def roster(presence: str = "present", boot: int = 3) -> list[NodeRecord]:
    return [
        NodeRecord(node=ME, name="n1", address="h:1", fingerprint=b"", boot=1),
        NodeRecord(node=OTHER, name="n2", address="h:2", fingerprint=b"", presence=presence, boot=boot),
    ]


def view(state: str, boot: int = 3, reason: str = "n3 and n4 accuse it") -> list[MemberView]:
    return [MemberView(OTHER, "n2", "h:2", state, 1, boot, 0, reason)]


def say(
    presence: Presence, nodes: list[NodeRecord], members: list[MemberView], now_ms: int
) -> list[tuple[str, str, int, str]]:
    return [(c.node, c.presence, c.boot, c.reason) for c in presence.decide(nodes, members, now_ms)]


def test_a_failed_node_is_failed_at_once_with_the_reason() -> None:
    presence = Presence(ME)
    assert say(presence, roster(), view("active"), 0) == []
    assert say(presence, roster(), view("suspicious"), 500) == []
    assert say(presence, roster(), view("failed"), 600) == [("n2", "failed", 3, "n3 and n4 accuse it")]
    assert say(presence, roster("failed"), view("deleted"), 700) == []  # once is enough


def test_a_stopped_node_is_not_a_failed_one() -> None:
    assert say(Presence(ME), roster(), view("stopped", reason=""), 0) == [("n2", "stopped", 3, "was stopped")]


def test_a_node_is_present_again_when_it_has_been_steady() -> None:
    presence = Presence(ME)
    assert say(presence, roster("failed"), view("active"), 0) == []
    assert say(presence, roster("failed"), view("active"), STEADY_MS - 1) == []
    assert say(presence, roster("failed"), view("active"), STEADY_MS) == [("n2", "present", 3, "answers again")]


def test_a_node_that_comes_and_goes_does_not_fill_the_log() -> None:
    presence = Presence(ME)
    written = [
        command
        for turn in range(50)
        for command in presence.decide(
            roster("failed"), view("active" if turn % 2 else "failed"), turn * STEADY_MS // 2
        )
    ]
    assert written == []


def test_a_verdict_on_an_older_process_is_no_news() -> None:
    assert say(Presence(ME), roster(boot=4), view("failed", boot=3), 0) == []
    assert say(Presence(ME), roster(boot=4), view("failed", boot=5), 0) == [("n2", "failed", 5, "n3 and n4 accuse it")]


def test_a_node_nobody_has_seen_is_failed_after_a_while() -> None:
    presence = Presence(ME)
    for members in ([], view("unknown", boot=-1)):
        assert say(presence, roster(), members, 0) == []
    assert say(presence, roster(), [], UNSEEN_MS - 1) == []
    [(node, state, boot, reason)] = say(presence, roster(), [], UNSEEN_MS)
    assert (node, state, boot) == ("n2", "failed", 3)
    assert "not been heard of" in reason
    assert say(presence, roster("stopped"), [], 2 * UNSEEN_MS) == []  # stopped stays stopped


def test_a_node_of_which_only_an_older_process_is_heard_is_failed_after_a_while() -> None:
    """All lost power, its disk came from an image: nobody hears it, and nobody has seen the process that the roster knows."""
    presence = Presence(ME)
    assert say(presence, roster(boot=4), view("active", boot=3), 0) == []
    assert say(presence, roster(boot=4), view("failed", boot=3), UNSEEN_MS - 1) == []
    [(node, state, boot, reason)] = say(presence, roster(boot=4), view("failed", boot=3), UNSEEN_MS)
    assert (node, state, boot) == ("n2", "failed", 4)
    assert "older boot" in reason
    for old in ("failed", "stopped"):
        assert (
            say(presence, roster(old, boot=4), view("active", boot=3), 2 * UNSEEN_MS) == []
        )  # and it does not come back
    assert say(presence, roster("failed", boot=4), view("active", boot=4), 3 * UNSEEN_MS) == []
    steady = 3 * UNSEEN_MS + STEADY_MS
    assert say(presence, roster("failed", boot=4), view("active", boot=4), steady) == [
        ("n2", "present", 4, "answers again")
    ]


def test_the_leader_is_present_whatever_is_said_of_it() -> None:
    gone = [NodeRecord(node=ME, name="n1", address="h:1", fingerprint=b"", presence="failed", boot=1)]
    rumour = [MemberView(ME, "n1", "h:1", "failed", 1, 1, 0, "late")]
    presence = Presence(ME)
    assert say(presence, gone, rumour, 0) == []
    assert say(presence, gone, rumour, STEADY_MS) == [("n1", "present", 1, "answers again")]
