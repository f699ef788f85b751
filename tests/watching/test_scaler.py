"""Several may listen to one scaler, and stop in any order; others may have wrapped it too."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import learnables as ln
from learnables.watching.scaler import listen


def make():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def scaling():
    return torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)


def train(model, optimizer, scaler, factors):
    """One step for each factor; those that are infinite the scaler skips."""
    for factor in factors:
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        scaler.update(4.0)


def wrapped(scaler):
    return {"step", "unscale_"} & vars(scaler).keys()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_who_stops_takes_nobody_else_with_him(order):
    model, optimizer = make()
    scaler = scaling()
    heard = [[], [], []]
    stops = [listen(scaler, one.append, lambda _: None) for one in heard]
    for n, who in enumerate(order):
        assert wrapped(scaler) == {"step", "unscale_"}
        stops[who]()
        stops[who]()  # twice is once
        train(model, optimizer, scaler, [math.inf, 1.0])
        left = set(order[n + 1 :])
        assert [len(one) for one in heard] == [
            n + 1 if i in left else order.index(i) for i in range(3)
        ]
    assert not wrapped(scaler)


@pytest.mark.parametrize("first", [0, 1])
def test_two_watches_on_one_scaler_end_in_any_order(tmp_path, first):
    """The one that ended took the other's wrapper with it: steps went by uncounted and unnamed."""
    model, optimizer = make()
    scaler = scaling()
    both = [
        ln.watch(model, optimizer, 1, tmp_path / str(i), scaler=scaler, budget=None)
        for i in range(2)
    ]
    train(model, optimizer, scaler, [1.0, math.inf])
    both[first].close()
    train(model, optimizer, scaler, [math.inf, 1.0])
    other = both[1 - first]
    other.close()
    assert both[first].overflows == {2: ("weight", "bias")}
    assert other.overflows == {2: ("weight", "bias"), 3: ("weight", "bias")}
    assert [o.step for o in other.run().observations] == [1, 2, 3, 4]
    assert not wrapped(scaler)


def test_one_scaler_of_two_optimizers_is_heard_by_each_watch_for_its_own(tmp_path):
    """As in the training of a GAN."""
    pairs, scaler = [make(), make()], scaling()
    both = [
        ln.watch(model, optimizer, 1, tmp_path / str(i), scaler=scaler, budget=None)
        for i, (model, optimizer) in enumerate(pairs)
    ]
    for step in range(1, 5):
        for i, (model, optimizer) in enumerate(pairs):
            optimizer.zero_grad()
            factor = math.inf if step == 2 + i else 1.0
            scaler.scale(model(torch.ones(2, 3)).sum() * factor).backward()
        for _, optimizer in pairs:
            scaler.step(optimizer)
        scaler.update()
        scaler.update(4.0)
    for watcher in both:
        watcher.close()
    assert [list(watcher.overflows) for watcher in both] == [[2], [3]]
    assert [watcher.step for watcher in both] == [4, 4]


def test_what_somebody_had_put_on_the_scaler_is_there_again():
    scaler, calls = scaling(), []
    original = scaler.step

    def theirs(optimizer):
        calls.append(optimizer)
        return original(optimizer)

    scaler.step = theirs
    model, optimizer = make()
    with ln.watch(model, optimizer, to=None, scaler=scaler):
        train(model, optimizer, scaler, [1.0])
    train(model, optimizer, scaler, [1.0])
    assert vars(scaler)["step"] is theirs
    assert calls == [optimizer] * 2
    assert "unscale_" not in vars(scaler)


def test_what_somebody_puts_over_ours_stays_and_works():
    scaler, calls = scaling(), []
    model, optimizer = make()
    watcher = ln.watch(model, optimizer, to=None, budget=None, scaler=scaler)
    ours = scaler.step

    def theirs(optimizer):
        calls.append(optimizer)
        return ours(optimizer)

    scaler.step = theirs
    train(model, optimizer, scaler, [math.inf])
    again = ln.watch(model, optimizer, to=None, budget=None, scaler=scaler)  # over theirs
    watcher.close()
    train(model, optimizer, scaler, [math.inf])
    again.close()
    train(model, optimizer, scaler, [1.0])
    assert vars(scaler)["step"] is theirs
    assert calls == [optimizer] * 3
    assert (list(watcher.overflows), list(again.overflows)) == ([1], [1])


def test_a_listener_that_stops_while_it_is_told_leaves_the_others_theirs():
    model, optimizer = make()
    scaler, heard = scaling(), []
    stop = listen(scaler, lambda _: stop(), lambda _: None)
    listen(scaler, heard.append, lambda _: None)
    train(model, optimizer, scaler, [math.inf, math.inf])
    assert heard == [optimizer] * 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_scaler_is_its_own_and_nobody_listens_to_it(duplicate):
    """Its step was that of the scaler that it was copied from."""
    model, optimizer = make()
    scaler = scaling()
    scaler.scale(torch.zeros(1))  # it makes its numbers when it is used first
    with ln.watch(model, optimizer, to=None, budget=None, scaler=scaler) as watcher:
        twin = duplicate(duplicate(scaler))
        twin.scale(model(torch.ones(2, 3)).sum() * math.inf).backward()
        twin.unscale_(optimizer)
        twin.step(optimizer)
        twin.update()
        assert (twin.get_scale(), scaler.get_scale()) == (2.0, 4.0)
        assert not watcher.overflows
        assert watcher.step == 0
    assert not wrapped(scaler)


def test_gradients_that_the_caller_unscales_are_told_and_the_scalers_own_are_not():
    model, optimizer = make()
    scaler, told = scaling(), []
    stop = listen(scaler, lambda _: None, told.append)
    train(model, optimizer, scaler, [1.0])
    assert told == []
    scaler.scale(model(torch.ones(2, 3)).sum()).backward()
    scaler.unscale_(optimizer)
    assert told == [optimizer]
    stop()
    assert not wrapped(scaler)
