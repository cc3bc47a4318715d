from __future__ import annotations

import random

import pytest

from idunno.base.errors import Conflict
from idunno.base.ids import NodeId
from idunno.scheduler.dispatch import (
    GRACE_MS,
    LEASES_MAX,
    SILENT_MS,
    Answer,
    Dispatch,
    EndAttempt,
    Lease,
    Output,
    Polled,
)
from idunno.scheduler.explain import DECISIONS_KEPT, Decisions
from idunno.scheduler.messages import Held
from idunno.scheduler.queues import PLAN, JobHead
from tests.unit.scheduler.ready import Readies


class World:
    """A dispatcher and the ledger's count of ended attempts."""

    def __init__(self, *awaited: str) -> None:
        self.ready = Readies()
        self.now_ms = 0
        self.orders = 0
        self.dispatch = Dispatch(0, [NodeId(n) for n in awaited], Decisions(), self.ready)

    def job(
        self,
        job: str,
        tasks: int | list[int],
        *,
        client: str = "ann",
        model: str = "m",
        old: bool = False,
        wake: bool = False,
    ) -> list[Output]:
        self.orders += 1
        self.ready.set(job, range(tasks) if isinstance(tasks, int) else tasks)
        self.dispatch.open(JobHead(job, model, client, self.orders, 10, planned=tasks != [PLAN]), old=old)
        return self.dispatch.wake(self.now_ms) if wake else []

    def poll(
        self, node: str, *held: Lease | Held, free: int = 1, boot: int = 1, slots: int = 1, models: str = "m"
    ) -> list[Output]:
        items = tuple(h.held if isinstance(h, Lease) else h for h in held)
        ready = tuple((m, 1) for m in models.split())
        return self.dispatch.poll(Polled(NodeId(node), node, boot, slots, free, ready, items), self.now_ms)

    def got(
        self, node: str, *held: Lease | Held, free: int = 1, boot: int = 1, slots: int = 1, models: str = "m"
    ) -> list[Lease]:
        return leases(self.poll(node, *held, free=free, boot=boot, slots=slots, models=models), node)

    def completed(self, job: str, task: int, now_ms: int = 0) -> list[Output]:
        """The log has a result of the task."""
        self.ready.over(job, task)
        return self.dispatch.completed(job, task, now_ms)

    def recovering(self) -> bool:
        return self.dispatch.recovering

    def fail(self, end: EndAttempt, *, again: bool = True) -> list[Output]:
        """What the log does with the end of an attempt."""
        self.ready.over(end.job, end.task)
        if again:
            self.ready.again(end.job, end.task, end.attempt + 1)
        found = self.dispatch.ended(end.job, end.task, end.attempt + 1, again=again)
        return found + self.dispatch.wake(self.now_ms)


def leases(outputs: list[Output], node: str) -> list[Lease]:
    return [lease for o in outputs if isinstance(o, Answer) and o.node == node for lease, _ in o.leases]


def drops(outputs: list[Output], node: str) -> list[Held]:
    return [held for o in outputs if isinstance(o, Answer) and o.node == node for held in o.drop]


def ends(outputs: list[Output]) -> list[EndAttempt]:
    return [o for o in outputs if isinstance(o, EndAttempt)]


# -- handing out ------------------------------------------------------------------------------------------------------


def test_tasks_of_a_job_go_out_in_order_each_once() -> None:
    world = World()
    world.job("j", 3)
    assert [lease.task for lease in world.got("n1") + world.got("n2") + world.got("n3")] == [0, 1, 2]
    assert world.poll("n4") == []


def test_a_worker_gets_only_models_it_has_ready_with_the_version_it_has() -> None:
    world = World()
    world.job("j", 3, model="other")
    assert world.poll("n1", models="m") == []
    [answer] = world.dispatch.poll(Polled(NodeId("n2"), "n2", 1, 1, 1, (("other", 7),), ()), 0)
    assert isinstance(answer, Answer)
    assert [version for _, version in answer.leases] == [7]


def test_a_waiting_poll_is_answered_as_soon_as_there_is_work() -> None:
    world = World()
    assert world.poll("n1") == []
    assert world.poll("n2") == []
    woken = world.job("j", 1, wake=True)
    assert [lease.task for lease in leases(woken, "n1")] == [0]
    assert world.job("k", 1, wake=True) == [Answer(NodeId("n2"), ((world.dispatch.leases["k", 0], 1),))]
    assert world.job("l", 1, wake=True) == []  # nobody waits any more


def test_work_that_comes_is_spread_over_the_waiting_before_anybody_gets_two() -> None:
    world = World()
    for node in ("n1", "n2", "n3"):
        assert world.poll(node, free=4, slots=4) == []
    woken = world.job("j", 5, wake=True)
    assert sorted(len(leases(woken, node)) for node in ("n1", "n2", "n3")) == [1, 2, 2]


def test_a_stock_beyond_the_slots_does_not_take_what_another_could_begin() -> None:
    world = World()
    world.poll("n2", free=0)
    world.poll("n3", free=0)
    world.job("j", 4)
    first = world.got("n1", free=2, slots=1)
    assert [lease.task for lease in first] == [0]  # of 3 left, 3 workers could begin one each
    world.job("more", 10)
    assert len(world.got("n1", *first, free=1, slots=1)) == 1  # plenty: it may fetch the next while one computes


def test_no_worker_is_idle_while_it_could_run_a_task() -> None:
    for seed in range(30):
        rng, world = random.Random(seed), World()
        held: dict[str, list[Lease]] = {f"n{i}": [] for i in range(6)}
        waiting: set[str] = set()

        def take(outputs: list[Output], held: dict[str, list[Lease]] = held, waiting: set[str] = waiting) -> None:
            for output in outputs:
                assert isinstance(output, Answer)
                held[output.node] += [lease for lease, _ in output.leases]
                waiting.discard(output.node)

        for step in range(300):
            node = rng.choice(sorted(held))
            if rng.random() < 0.15:
                take(
                    world.job(f"j{step}", rng.randint(1, 8), model=rng.choice("ab"), client=rng.choice("xy"), wake=True)
                )
            elif held[node]:
                lease = held[node].pop()
                take(world.completed(lease.head.job, lease.task, step))
            elif node not in waiting:
                waiting.add(node)
                take(world.poll(node, models="a b"))
            idle = [n for n in waiting if not held[n]]
            assert not (idle and world.dispatch.queues), f"seed {seed}, step {step}: {idle} wait beside ready tasks"


def test_planning_goes_first_but_a_client_has_one_at_a_time() -> None:
    world = World()
    world.job("big", 100)
    for n in range(3):
        world.job(f"new{n}", [PLAN])
    world.job("bobs", [PLAN], client="bob")
    got = [(lease.head.job, lease.task) for n in range(4) for lease in world.got(f"n{n}")]
    assert got == [("new0", PLAN), ("bobs", PLAN), ("big", 0), ("big", 1)]
    world.completed("new0", PLAN, 0)
    assert [lease.head.job for lease in world.got("n5")] == ["new1"]


def test_a_hundred_thousand_ready_tasks_cost_a_poll_no_more_than_ten() -> None:
    def looks(tasks: int) -> int:
        world = World()
        for n in range(10):
            world.job(f"j{n}", tasks // 10)
        world.got("n1")
        for turn in range(50):
            [lease] = world.got(f"n{turn % 5}")
            world.completed(lease.head.job, lease.task, turn)
        return world.ready.looks

    assert looks(100_000) <= looks(1_000) + 10


def test_what_is_handed_out_is_the_lowest_that_is_ready_whatever_comes_back() -> None:
    for seed in range(20):
        rng, world = random.Random(seed), World()
        world.job("j", 40)
        ready, out = set(range(40)), dict[int, Lease]()
        for step in range(400):
            what = rng.random()
            if what < 0.4 and ready:
                [lease] = world.got(f"n{step}")  # each has room for one
                assert lease.task == min(ready), f"seed {seed}, step {step}"
                ready.discard(lease.task)
                out[lease.task] = lease
            elif what < 0.6 and out:
                task = rng.choice(sorted(out))
                [end] = ends(world.dispatch.lost(out.pop(task).node, "lost"))
                world.fail(end)
                ready.add(task)
            elif what < 0.7:
                task = rng.randrange(40)  # a result of whatever task, from wherever
                world.completed("j", task)
                ready.discard(task)
                if task in out:
                    world.dispatch.poll_over(out.pop(task).node)
            queues = world.dispatch.queues
            assert queues.ready_of_job("j") == queues.ready_of_model("m") == len(ready)
            assert bool(queues) == bool(ready)
        assert len(world.dispatch.queues._jobs["j"].back) <= 40


# -- what is given back -----------------------------------------------------------------------------------------------


def test_a_lost_workers_tasks_go_to_others_when_the_log_has_counted_the_attempt() -> None:
    world = World()
    world.job("j", 1)
    [lease] = world.got("n1")
    assert lease.attempt == 0
    assert world.poll("n2") == []
    outputs = world.dispatch.lost(NodeId("n1"), "worker n1 was lost")
    assert ends(outputs) == [EndAttempt("j", 0, 0, NodeId("n1"), "worker n1 was lost")]
    assert leases(outputs, "n2") == []  # not before the attempt is counted
    woken = world.fail(ends(outputs)[0])
    assert [(x.task, x.attempt) for x in leases(woken, "n2")] == [(0, 1)]


def test_a_poison_task_ends_after_its_attempts() -> None:
    world = World()
    world.job("j", 1)
    for attempt in range(3):
        [lease] = world.got(f"n{attempt}")
        assert lease.attempt == attempt
        [end] = ends(world.dispatch.lost(NodeId(f"n{attempt}"), "worker was lost"))
        world.fail(end, again=attempt < 2)
    assert world.poll("n9") == []
    assert world.dispatch.leases == {}


def test_a_restarted_worker_has_lost_what_its_older_process_held() -> None:
    world = World()
    world.job("j", 2)
    world.got("n1")
    outputs = world.poll("n1", boot=2)
    assert [e.error for e in ends(outputs)] == ["worker n1 was restarted"]
    assert [lease.task for lease in leases(outputs, "n1")] == [1]
    with pytest.raises(Conflict, match="in use twice"):
        world.poll("n1", boot=1)


def test_a_silent_worker_is_lost() -> None:
    world = World()
    world.job("j", 1)
    world.got("n1")
    assert world.dispatch.tick(SILENT_MS) == []
    [end] = ends(world.dispatch.tick(SILENT_MS + 1))
    assert end.error == "worker n1 has not polled for 30 s"


def test_a_worker_wrongly_called_lost_polls_on_and_drops_what_is_void() -> None:
    world = World()
    world.job("j", 1)
    [lease] = world.got("n1")
    world.poll("n1", lease)
    assert Answer(NodeId("n1")) in world.dispatch.lost(NodeId("n1"), "suspected")
    assert drops(world.poll("n1", lease), "n1") == [lease.held]


def test_tasks_whose_answer_got_lost_are_ready_again_without_an_attempt() -> None:
    world = World()
    world.job("j", 1)
    [first] = world.got("n1")
    [again] = world.got("n1")  # its poll names nothing: it never heard of the lease
    assert (again.task, again.attempt) == (first.task, 0)
    assert len(world.dispatch.leases) == 1


def test_a_task_whose_answer_got_lost_goes_to_another_worker_that_waits() -> None:
    world = World()
    world.job("j", 1)
    world.got("n1")
    assert world.got("n2") == []
    [lease] = leases(world.poll("n1", free=0), "n2")  # it names nothing, and takes nothing
    assert (lease.task, lease.attempt) == (0, 0)


def test_a_task_whose_answers_get_lost_again_and_again_is_noted_once() -> None:
    world = World()
    world.job("j", 2)
    world.got("n1")
    world.got("n2")  # a later one: what comes back lies before it
    for _ in range(100):
        [lease] = world.got("n1")
        assert lease.task == 0
    assert len(world.dispatch.queues._jobs["j"].back) <= 1


def test_a_task_whose_end_is_on_its_way_into_the_log_is_not_given_back() -> None:
    world = World()
    world.job("j", 1)
    [lease] = world.got("n1")
    world.dispatch.reporting("j", 0, NodeId("n1"))
    assert world.poll("n1") == []  # reported, so no longer held, and not lent again
    assert ends(world.dispatch.lost(NodeId("n1"), "lost")) == []
    # The report came to nothing, and nobody is left to repeat it: now the attempt has ended.
    assert [e.attempt for e in ends(world.dispatch.reported("j", 0, NodeId("n1")))] == [lease.attempt]


def test_a_report_that_came_to_nothing_may_be_repeated_by_a_worker_that_lives() -> None:
    world = World()
    world.job("j", 1)
    [lease] = world.got("n1")
    world.dispatch.reporting("j", 0, NodeId("n1"))
    assert world.dispatch.reported("j", 0, NodeId("n1")) == []
    assert world.poll("n1", lease) == []
    assert world.completed("j", 0, 0) == [Answer(NodeId("n1"), (), (lease.held,))]


def test_a_worker_that_was_lost_only_in_appearance_may_repeat_its_report_too() -> None:
    world = World()
    world.job("j", 1)
    [lease] = world.got("n1")
    world.dispatch.reporting("j", 0, NodeId("n1"))
    assert world.dispatch.lost(NodeId("n1"), "lost") == []
    assert world.poll("n1", lease, free=0) == []
    assert world.dispatch.reported("j", 0, NodeId("n1")) == []  # no attempt has ended: it still holds the task
    assert ends(world.dispatch.lost(NodeId("n1"), "lost")) != []


def test_the_end_of_an_older_attempt_does_not_touch_the_present_one() -> None:
    world = World()
    world.job("j", 1)
    world.got("n1")
    [end] = ends(world.dispatch.lost(NodeId("n1"), "lost"))
    world.fail(end)
    [second] = world.got("n2")
    assert world.dispatch.ended("j", 0, 1, again=True) == []  # heard twice
    assert world.dispatch.leases["j", 0] is second


def test_cancelling_tells_those_who_wait_at_once_and_the_others_at_their_next_poll() -> None:
    world = World()
    world.job("j", 5)
    [mine], [other] = world.got("n1"), world.got("n2")
    assert world.poll("n1", mine, free=0) == []
    assert drops(world.dispatch.close("j"), "n1") == [mine.held]
    assert drops(world.poll("n2", other, free=0), "n2") == [other.held]
    assert world.dispatch.leases == {}
    assert world.poll("n3") == []


def test_a_result_from_elsewhere_voids_the_lease() -> None:
    world = World()
    world.job("j", 1)
    [lease] = world.got("n1")
    world.poll("n1", lease, free=0)
    assert drops(world.completed("j", 0, 0), "n1") == [lease.held]


def test_what_was_not_answered_is_not_charged() -> None:
    world = World()
    world.job("a", 3, model="a")
    world.job("b", 3, model="b")
    [first] = world.got("n1", models="a b")
    before = world.dispatch.queues.clock.time("a")
    assert (first.head.model, before) == ("a", 10)
    [end] = ends(world.dispatch.lost(NodeId("n1"), "lost"))
    world.fail(end)
    assert world.dispatch.queues.clock.time("a") == 0


# -- a new leader -----------------------------------------------------------------------------------------------------


def test_a_new_leader_takes_over_what_workers_hold_and_lends_nothing_twice() -> None:
    world = World("n1", "n2")
    world.ready.ended["j", 3] = 1
    world.job("j", 5, old=True)
    held = [Held(job="j", task=0, attempt=0), Held(job="j", task=3, attempt=1)]
    assert world.poll("n1", *held, free=1, slots=4) == []  # n2 may hold the rest
    assert world.recovering()
    outputs = world.poll("n2", Held(job="j", task=1, attempt=0), free=1, slots=4)
    assert not world.recovering()
    assert sorted(lease.task for n in ("n1", "n2") for lease in leases(outputs, n)) == [2, 4]
    assert {(k[1], lease.node) for k, lease in world.dispatch.leases.items()} >= {(0, "n1"), (3, "n1"), (1, "n2")}
    assert drops(outputs, "n1") == drops(outputs, "n2") == []


def test_the_grace_ends_by_time_when_a_worker_never_speaks() -> None:
    world = World("n1", "n2")
    world.job("j", 1, old=True)
    assert world.poll("n1") == []
    assert world.dispatch.tick(GRACE_MS - 1) == []
    assert [lease.task for lease in leases(world.dispatch.tick(GRACE_MS), "n1")] == [0]


def test_the_grace_ends_when_the_last_awaited_worker_has_failed() -> None:
    world = World("n1", "n2")
    world.job("j", 1, old=True)
    world.poll("n1")
    assert [lease.task for lease in leases(world.dispatch.not_awaited(NodeId("n2"), 5), "n1")] == [0]


def test_work_that_came_after_the_new_leader_does_not_wait_for_the_grace() -> None:
    world = World("n1", "n2")
    world.job("old", 1, old=True)
    world.job("new", 1)
    assert [lease.head.job for lease in world.got("n1", free=2)] == ["new"]


def test_what_is_held_but_no_longer_ready_is_dropped() -> None:
    world = World("n1")
    world.ready.ended["j", 1] = 2
    world.job("j", [1, 2], old=True)
    stale = [Held(job="j", task=0, attempt=0), Held(job="j", task=1, attempt=1), Held(job="gone", task=0, attempt=0)]
    outputs = world.poll("n1", *stale, free=0)
    assert drops(outputs, "n1") == stale
    assert world.dispatch.leases == {}


def test_two_workers_that_hold_the_same_task_the_first_to_say_so_keeps_it() -> None:
    world = World("n1", "n2")
    world.job("j", 1, old=True)
    held = Held(job="j", task=0, attempt=0)
    assert world.poll("n1", held, free=0) == []
    assert drops(world.poll("n2", held, free=0), "n2") == [held]


# -- why --------------------------------------------------------------------------------------------------------------


def test_every_lease_has_a_reason_and_the_reasons_are_bounded() -> None:
    world = World()
    world.job("j", 100)
    held: list[Lease] = []
    for _ in range(40):
        held = world.got("n1")
        world.completed("j", held[0].task, 0)
    found = world.dispatch.decisions.about("j")
    assert len(found) == DECISIONS_KEPT
    assert found[0].why.startswith("task 39 of job j, attempt 1, went to n1: m is first of 1 models with work, 60 more")
    world.job("many", 1_000)
    assert len(world.got("n2", free=10_000, slots=10_000)) == LEASES_MAX
