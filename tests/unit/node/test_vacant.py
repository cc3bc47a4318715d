"""Members that are gone for certain, before the detector says so."""

from __future__ import annotations

from idunno.base.ids import NodeId
from idunno.membership.events import MemberView
from idunno.node.vacant import HOLDS_S, Vacant
from tests.unit.scheduler.test_presence import view

N2 = NodeId("n2")


class Detector:
    def __init__(self) -> None:
        self.state, self.boot, self.now_s = "active", 3, 0.0
        self.vacant = Vacant(self.view, lambda: self.now_s)

    def view(self) -> list[MemberView]:
        return view(self.state, boot=self.boot)

    def said(self) -> str:
        return next(member.state for member in self.vacant.view() if member.node == N2)


def test_a_refused_connection_is_the_end_of_a_process_until_it_listens_again() -> None:
    detector = Detector()
    assert detector.said() == "active"
    assert detector.vacant.refused(N2)
    assert not detector.vacant.refused(N2)  # no news
    assert detector.said() == "failed"
    detector.vacant.connected(N2)
    assert detector.said() == "active"


def test_the_word_is_about_one_process_and_about_now() -> None:
    detector = Detector()
    detector.vacant.refused(N2)
    detector.boot = 4
    assert detector.said() == "active"
    detector.vacant.refused(N2)
    detector.now_s = HOLDS_S + 1
    assert detector.said() == "active"
    detector.state = "stopped"
    assert not detector.vacant.refused(N2)
    assert detector.said() == "stopped"


def test_a_deposed_leader_is_failed_once_the_detector_accuses_it_too() -> None:
    detector = Detector()
    detector.vacant.deposed(N2)
    assert detector.said() == "active"  # it may have handed over
    detector.state = "suspicious"
    assert detector.said() == "failed"
    detector.state = "active"  # it refuted
    assert detector.said() == "active"
