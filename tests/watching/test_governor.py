import math

from hypothesis import assume, given
from hypothesis import strategies as st

from learnables.watching.governor import Governor


def simulate(every, budget, step, look, check, steps):
    """A training on a clock of its own; returns the governor and the steps of its looks."""
    governor, looks = Governor(every, budget), []
    for n in range(1, steps + 1):
        if governor.due(n):
            looks.append(n)
            governor.looked(look)
        elif governor.watches(n):
            governor.checked(check)
        governor.stepped(step)
    return governor, looks


@given(
    every=st.integers(1, 50),
    budget=st.sampled_from([0.001, 0.01, 0.1]),
    step=st.floats(1e-3, 1.0),
    look=st.floats(1e-4, 1.0),
    check=st.floats(1e-6, 1e-2),
)
def test_the_budget_holds_after_the_first_looks(every, budget, step, look, check):
    steps = 400
    governor, looks = simulate(every, budget, step, look, check, steps)
    # Five looks are made whatever they cost, and three checks before one is known.
    assert governor.spent <= budget * governor.elapsed + 5 * look + 3 * check + 1e-9
    assert looks[0] == 1
    assert all(n % every == 0 for n in looks[1:])


@given(every=st.integers(1, 50))
def test_looks_come_as_asked_where_they_are_cheap(every):
    assume(every > 1)
    _, looks = simulate(every, 0.01, step=1.0, look=1e-3, check=1e-5, steps=200)
    assert looks == [1, *range(every, 201, every)]


def test_checks_that_sometimes_take_long_leave_most_of_the_budget_to_the_looks():
    governor, looks = Governor(1, 0.01), []
    for n in range(1, 2001):
        if governor.due(n):
            looks.append(n)
            governor.looked(0.01)
        elif governor.watches(n):
            governor.checked(0.05 if n % 10 == 0 else 0.001)
        governor.stepped(0.1)
    assert governor.spent <= 0.01 * governor.elapsed + 0.05  # the last check took long
    assert len(looks) * 0.01 > 0.6 * 0.01 * governor.elapsed


def test_a_short_run_has_the_looks_that_an_alarm_needs():
    governor, looks = simulate(10, 0.01, step=1e-3, look=0.1, check=1e-3, steps=100)
    assert looks == [1, 10, 20, 30, 40]
    assert governor.overhead > 1


def test_ranks_that_have_agreed_on_nothing_yet_leave_nothing_out():
    governor = Governor(5, 0.01)
    governor.agree(0)
    assert governor.due(1)
    governor.looked(1.0)
    for n in range(2, 11):
        governor.checked(1.0)
        governor.stepped(0.001)
        assert governor.watches(n)
        assert governor.due(n) == (n % 5 == 0)


def test_without_a_budget_every_look_and_every_check_is_made():
    governor, looks = simulate(1, None, step=1e-6, look=1.0, check=1.0, steps=20)
    assert len(looks) == 20
    assert governor.overhead > 1


def test_ranks_that_agree_decide_alike_whatever_their_own_clocks_say():
    fast, slow = Governor(10, 0.01), Governor(10, 0.01)
    for governor, seconds in ((fast, 0.1), (slow, 0.4)):
        governor.looked(0.3 * seconds)
        for _ in range(7):
            governor.checked(0.002 * seconds)
            governor.stepped(seconds)
    clocks = [max(pair) for pair in zip(fast.clocks(), slow.clocks(), strict=True)]
    fast.agree(8, clocks)
    slow.agree(8, clocks)
    for _ in range(300):
        fast.stepped(0.1)
        slow.stepped(0.9)
    decisions = [[(g.due(n), g.watches(n)) for n in range(9, 300)] for g in (fast, slow)]
    assert decisions[0] == decisions[1]
    assert any(due for due, _ in decisions[0])


def test_the_overhead_is_unknown_before_any_step():
    assert math.isnan(Governor(1, 0.01).overhead)
