import asyncio

import pytest

from piccolo_jax.synthesis.limits import Gate, Spending, estimate_tokens


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds
        await asyncio.sleep(0)


def entries(tokens, before=lambda i, gate: None, **limits):
    """Seconds at which requests of so many tokens pass, one after the other."""
    clock = Clock()
    gate = Gate(**limits, clock=clock, sleep=clock.sleep)

    async def run():
        times = []
        for i, n in enumerate(tokens):
            before(i, gate)
            await gate.enter(n)
            times.append(round(clock.now - 1000, 6))
        return times

    return asyncio.run(run())


def test_without_limits_nothing_waits():
    assert entries([10**9] * 4) == [0, 0, 0, 0]


def test_requests_per_minute_are_spaced_evenly():
    assert entries([5] * 4, requests_per_minute=30) == pytest.approx([0, 2, 4, 6])


def test_tokens_per_minute_hold_back_the_next_request():
    assert entries([100, 300, 100], tokens_per_minute=600) == pytest.approx([0, 10, 40])


def test_the_stricter_limit_counts():
    times = entries([100, 10, 10], requests_per_minute=30, tokens_per_minute=600)
    assert times == pytest.approx([0, 10, 12])


def test_what_was_estimated_too_high_is_given_back_and_too_low_is_taken():
    corrections = {1: -50, 2: 60}
    times = entries(
        [100, 100, 100], lambda i, gate: gate.correct(corrections.get(i, 0)), tokens_per_minute=600
    )
    assert times == pytest.approx([0, 5, 21])


def test_time_that_was_not_used_is_not_saved_up():
    clock = Clock()
    gate = Gate(requests_per_minute=60, clock=clock, sleep=clock.sleep)

    async def run():
        await gate.enter(1)
        clock.now += 100
        times = []
        for _ in range(3):
            await gate.enter(1)
            times.append(clock.now - 1100)
        return times

    assert asyncio.run(run()) == pytest.approx([0, 1, 2])


def test_a_pause_holds_everything_and_a_shorter_one_does_not_end_it():
    def pause(i, gate):
        if i == 1:
            gate.pause(7)
            gate.pause(3)

    assert entries([1, 1, 1], pause) == pytest.approx([0, 7, 7])


def test_a_pause_that_begins_while_others_wait_holds_them_too():
    clock = Clock()
    gate = Gate(requests_per_minute=60, clock=clock, sleep=clock.sleep)

    async def run():
        await gate.enter(1)
        waiting = [asyncio.create_task(gate.enter(1)) for _ in range(2)]
        await asyncio.sleep(0)
        gate.pause(9)
        await asyncio.gather(*waiting)
        return clock.now - 1000

    assert 10 <= asyncio.run(run()) < 10.5


def test_a_budget_is_left_until_it_is_spent():
    class Cost:
        prompt_tokens, completion_tokens, lost_tokens, estimated = 5, 2, 1, True

    spending = Spending(budget=16)
    assert spending.left()
    spending.add(Cost)
    assert spending.left()
    assert (spending.total, spending.estimated_tokens) == (8, 7)
    spending.add(Cost)
    assert not spending.left()
    assert Spending(0, 10**9).left()


def test_tokens_are_estimated_by_bytes():
    assert [estimate_tokens(t) for t in ("", "a", "abc", "abcd", "检索")] == [0, 1, 1, 2, 2]
