"""Epistemic logic against a recursive oracle that knows no worlds, and against stories worked out by hand."""

from __future__ import annotations

import random
from itertools import product

import pytest

from tl_tomsparse.stories.logic import (
    And,
    Believes,
    Event,
    Fact,
    Not,
    Outcome,
    State,
    change,
    learn,
    update,
)

AGENTS = ("Anna", "Ben", "Clara")
VALUES = ("a", "b", "c")


def oracle(chain, events, start="a"):
    """What a chain of agents believes, by replaying the events through their eyes, without Kripke models."""
    if not events:
        return start
    kind, *rest = events[-1]
    before = events[:-1]
    if kind == "change":
        value, observers, secret = rest
        if not chain:
            return value
        # One secret observer may come first (then see the others openly); nobody else's view contains a
        # secret one.
        inner = list(chain)
        if inner[0] in secret and inner[0] not in observers:
            first = inner[0]
            while inner and inner[0] == first:
                inner.pop(0)
        return value if all(a in observers for a in inner) else oracle(chain, before, start)
    learners, aware = rest
    if not chain or any(a not in learners and a not in aware for a in chain):
        return oracle(chain, before, start)
    cut = len(chain)
    while cut and chain[cut - 1] in learners:
        cut -= 1
    return oracle(chain[:cut] if cut < len(chain) else chain, before, start)


def as_event(event):
    kind, *rest = event
    if kind == "change":
        value, observers, secret = rest
        return change(AGENTS, "x", value, observers, secret)
    return learn(AGENTS, "x", VALUES, *rest)


def random_events(rng, n):
    def some():
        return tuple(a for a in AGENTS if rng.random() < 0.5)

    return [
        ("change", rng.choice(VALUES), some(), some()) if rng.random() < 0.5 else ("learn", some(), some())
        for _ in range(n)
    ]


def chains(order):
    return [chain for n in range(order + 1) for chain in product(AGENTS, repeat=n)]


@pytest.mark.parametrize("seed", range(60))
def test_beliefs_of_every_order_match_the_recursive_oracle(seed):
    rng = random.Random(seed)
    events = random_events(rng, 5)
    state = State.common_belief(AGENTS, {"x": "a"})
    for i, event in enumerate(events):
        state = update(state, as_event(event))
        for chain in chains(3):
            assert state.belief(chain, "x") == oracle(chain, events[: i + 1]), (chain, events[: i + 1])
        assert state.is_kd45()


def test_contraction_changes_no_belief_and_leaves_a_minimal_state():
    state = State.common_belief(AGENTS, {"x": "a"})
    for event in (change(AGENTS, "x", "b", ["Ben"]), learn(AGENTS, "x", VALUES, ["Clara"], ["Anna"])):
        state = update(state, event)
    # Two copies of every world that see each other's copies: the same beliefs, twice the worlds.
    n = len(state)
    doubled = State(
        state.valuations * 2,
        {
            a: tuple(frozenset(v + n * (1 - i // n) for v in relation[i % n]) for i in range(2 * n))
            for a, relation in state.considers.items()
        },
        state.actual,
    )
    assert len(doubled) == 2 * n
    assert len(doubled.contracted()) == n
    for chain in chains(4):
        assert doubled.possible_values(chain, "x") == doubled.contracted().possible_values(chain, "x")
        assert state.possible_values(chain, "x") == doubled.possible_values(chain, "x")


def test_stays_small():
    rng = random.Random(1)
    state = State.common_belief(AGENTS, {"x": "a"})
    for event in random_events(rng, 30):
        state = update(state, as_event(event))
    assert len(state) <= 40  # beliefs about three values by three agents, however many events


def test_sally_and_anne():
    people = ("Sally", "Anne")
    state = State.common_belief(people, {"ball": "basket"})
    state = update(state, change(people, "ball", "box", ["Anne"]))
    assert state.belief((), "ball") == "box"
    assert state.belief(("Sally",), "ball") == "basket"
    assert state.belief(("Anne",), "ball") == "box"
    assert state.belief(("Anne", "Sally"), "ball") == "basket"
    assert state.belief(("Sally", "Anne"), "ball") == "basket"
    assert state.belief(("Anne", "Sally", "Anne"), "ball") == "basket"


def test_a_secret_observer_knows_what_the_mover_thinks_of_her():
    people = ("Sally", "Anne", "Tom")
    state = State.common_belief(people, {"ball": "basket"})
    state = update(state, change(people, "ball", "box", ["Anne"], secret=["Sally"]))
    assert state.belief(("Sally",), "ball") == "box"
    assert state.belief(("Sally", "Anne"), "ball") == "box"
    assert state.belief(("Anne", "Sally"), "ball") == "basket"
    assert state.belief(("Sally", "Anne", "Sally"), "ball") == "basket"
    assert state.belief(("Tom",), "ball") == "basket"


def test_looking_mends_a_false_belief_and_is_noticed_without_its_result():
    people = ("Sam", "Ann")
    state = State.common_belief(people, {"contents": "chocolate"})
    state = update(state, change(people, "contents", "popcorn", []))
    assert state.belief(("Sam",), "contents") == "chocolate"
    state = update(state, learn(people, "contents", ("chocolate", "popcorn"), ["Sam"], aware=["Ann"]))
    assert state.belief(("Sam",), "contents") == "popcorn"
    # Ann, who believes in the label, thinks that this is what he saw; he knows that she does.
    assert state.belief(("Ann", "Sam"), "contents") == "chocolate"
    assert state.belief(("Sam", "Ann"), "contents") == "chocolate"


def test_an_undecided_agent_has_no_belief_and_formulas_say_so():
    state = State(
        ({"x": "a"}, {"x": "b"}),
        {"Anna": (frozenset({0, 1}), frozenset({0, 1})), "Ben": (frozenset({0}), frozenset({1}))},
    )
    assert state.belief(("Anna",), "x") is None
    assert state.possible_values(("Anna",), "x") == {"a", "b"}
    assert state.holds(Believes("Ben", Fact("x", "a")))
    assert not state.holds(Believes("Anna", Fact("x", "a")))
    knows_whether = Not(And((Not(Believes("Ben", Fact("x", "a"))), Not(Believes("Ben", Fact("x", "b"))))))
    assert state.holds(Believes("Anna", knows_whether))


def test_a_plain_test_would_break_kd45_and_is_recognised():
    state = State.common_belief(("Sam",), {"x": "a"})
    state = update(state, change(("Sam",), "x", "b", []))
    look = Event((Outcome(pre=Fact("x", "b")),), {"Sam": (frozenset({0}),)}, lambda _state: 0)
    assert not update(state, look).is_kd45()
    assert update(state, learn(("Sam",), "x", ("a", "b"), ["Sam"])).is_kd45()


def test_refusals_name_what_is_wrong():
    state = State.common_belief(AGENTS, {"x": "a"})
    with pytest.raises(ValueError, match="Clara"):
        update(state, change(("Anna", "Ben"), "x", "b", ["Anna"]))
    impossible = Event(
        (Outcome(pre=Fact("x", "b")),), {a: (frozenset({0}),) for a in AGENTS}, lambda _state: 0
    )
    with pytest.raises(ValueError, match="precondition"):
        update(state, impossible)
