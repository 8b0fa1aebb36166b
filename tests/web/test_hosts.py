from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from utils.web.hosts import HostQueue


def test_the_host_with_the_fewest_in_flight_comes_first():
    queue: HostQueue[str] = HostQueue(0)
    for number in range(4):
        queue.put("slow", f"slow {number}")
    queue.put("fast", "fast 0")
    assert [queue.take() for _ in range(6)] == ["slow 0", "fast 0", "slow 1", "slow 2", "slow 3", None]


def test_a_host_at_its_limit_waits_until_one_is_done():
    queue: HostQueue[int] = HostQueue(2)
    for number in range(4):
        queue.put("host", number)
    assert [queue.take() for _ in range(3)] == [0, 1, None]
    assert len(queue) == 2
    queue.done("host")
    assert [queue.take(), queue.take()] == [2, None]


@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_every_job_comes_once_and_no_limit_is_broken(hosts: list[int], limit: int, rng: random.Random):
    queue: HostQueue[tuple[int, int]] = HostQueue(limit)
    waiting = list(enumerate(hosts))
    in_flight: list[tuple[int, int]] = []
    taken = []
    while waiting or len(queue) or in_flight:
        action = rng.random()
        if waiting and action < 0.4:
            number, host = waiting.pop(0)
            queue.put(host, (number, host))
        elif action < 0.7:
            job = queue.take()
            counts = [sum(flying[1] == host for flying in in_flight) for host in range(4)]
            if job is None:
                assert not len(queue) or limit
            else:
                taken.append(job)
                in_flight.append(job)
                assert not limit or counts[job[1]] < limit
        elif in_flight:
            queue.done(in_flight.pop(rng.randrange(len(in_flight)))[1])
    assert sorted(taken) == list(enumerate(hosts))
    for host in range(4):
        assert [job for job in taken if job[1] == host] == sorted(job for job in taken if job[1] == host)
