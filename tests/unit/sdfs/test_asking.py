# Asking again until the time is over, on virtual time.
from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from idunno.base.errors import NoQuorum, Unavailable
from idunno.sdfs.asking import Asker
from idunno.sdfs.messages import STAT, Stat
from tests.unit.sdfs.world import run


@pytest.mark.parametrize("seed", range(50))
def test_an_attempt_for_which_no_time_is_left_hides_no_reason(seed: int) -> None:
    async def call(method: object, request: object, *, timeout_s: float, body: object) -> Any:
        if timeout_s < 0.1:  # the machine is slow: it is late before it is sent
            raise Unavailable("not sent: no time was left")
        raise NoQuorum("no leader")

    async def story() -> None:
        asker = Asker(lambda: cast(Any, SimpleNamespace(call=call)), "stat of f", 0.3, random.Random(seed))
        with pytest.raises(NoQuorum, match="no leader"):
            await asker.ask(STAT, Stat("f"))

    run(story)
