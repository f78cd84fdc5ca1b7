"""Dynamic epistemic logic: what every agent believes after every event, to any order.

    state   (W, {R_a}, V, w0)          worlds, belief relation of each agent, valuation, actual world event
    (E, {Q_a}, pre, post, e0) update  W' = {(w, e) : w |= pre(e)},   (w, e) R'_a (v, f)  iff  w R_a v and e
    Q_a f,   V' = V(w) overwritten by post(e)

(Baltag, Moss and Solecki 1998; van Ditmarsch, van der Hoek and Kooi, *Dynamic Epistemic Logic*, 2007.) After
each update the part that the actual world reaches is kept and contracted by bisimulation, which changes no
belief of any order.

Learning is the *assignment* of what is actually so, for those who learn: a plain test would leave an agent
whose belief is false with no world at all. Nothing here says how plausible one world is against another: an
agent either considers it or does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Valuation = Mapping[str, str]
Relation = tuple[
    frozenset[int], ...
]  # for each world (or event), those that the agent considers possible there


@dataclass(frozen=True)
class Fact:
    """The formula "variable has value"."""

    variable: str
    value: str


@dataclass(frozen=True)
class Not:
    """Negation."""

    formula: Formula


@dataclass(frozen=True)
class And:
    """Conjunction; the empty one is true."""

    formulas: tuple[Formula, ...] = ()


@dataclass(frozen=True)
class Believes:
    """The formula "agent believes formula": it holds in every world that the agent considers possible."""

    agent: str
    formula: Formula


Formula = Fact | Not | And | Believes
TRUE = And()


@dataclass(frozen=True)
class State:
    """A pointed Kripke model.

    Attributes:
        valuations: one mapping from variable to value for each world.
        considers: for each agent and world, the worlds that the agent considers possible there.
        actual: index of the actual world.
    """

    valuations: tuple[Valuation, ...]
    considers: Mapping[str, Relation]
    actual: int = 0

    @classmethod
    def common_belief(cls, agents: Iterable[str], facts: Valuation) -> State:
        """The state in which `facts` hold and this is commonly believed: one world, which everybody
        considers.
        """
        return cls((dict(facts),), {agent: (frozenset({0}),) for agent in agents})

    def __len__(self) -> int:
        """The number of worlds."""
        return len(self.valuations)

    def holds(self, formula: Formula, world: int | None = None) -> bool:
        """Whether a formula holds, in the actual world by default.

        Raises:
            KeyError: for a variable or an agent that the state does not have.
        """
        world = self.actual if world is None else world
        match formula:
            case Fact(variable, value):
                return self.valuations[world][variable] == value
            case Not(inner):
                return not self.holds(inner, world)
            case And(parts):
                return all(self.holds(part, world) for part in parts)
            case Believes(agent, inner):
                return all(self.holds(inner, other) for other in self.considers[agent][world])

    def possible_values(self, agents: Sequence[str], variable: str) -> frozenset[str]:
        """The values of `variable` that are possible for the chain of agents, outermost first; no agent gives
        the actual value.
        """
        worlds = {self.actual}
        for agent in agents:
            worlds = {other for world in worlds for other in self.considers[agent][world]}
        return frozenset(self.valuations[world][variable] for world in worlds)

    def belief(self, agents: Sequence[str], variable: str) -> str | None:
        """What the chain of agents believes the value to be, or None if they are undecided.

        `belief(("Anna", "Ben"), "ball")` is where Anna thinks that Ben thinks that the ball is.
        """
        values = self.possible_values(agents, variable)
        return next(iter(values)) if len(values) == 1 else None

    def is_kd45(self) -> bool:
        """Whether relations are serial, transitive and Euclidean: beliefs consistent and introspective."""
        for relation in self.considers.values():
            for seen in relation:
                if not seen or any(relation[other] != seen for other in seen):
                    return False
        return True

    def contracted(self) -> State:
        """The smallest state with the same beliefs of every order: reachable worlds, up to bisimulation."""
        reached, stack = {self.actual}, [self.actual]
        while stack:
            world = stack.pop()
            for relation in self.considers.values():
                new = relation[world] - reached
                reached |= new
                stack.extend(new)
        worlds = sorted(reached)
        block = dict(zip(worlds, _numbered(tuple(sorted(self.valuations[w].items())) for w in worlds)))
        while True:  # partition refinement: split worlds until all of a block see the same blocks
            signatures = [
                (block[w], *(frozenset(block[v] for v in self.considers[a][w]) for a in self.considers))
                for w in worlds
            ]
            refined = dict(zip(worlds, _numbered(signatures)))
            if len(set(refined.values())) == len(set(block.values())):
                break
            block = refined
        first = {block[w]: w for w in reversed(worlds)}
        order = sorted(first)
        return State(
            tuple(self.valuations[first[b]] for b in order),
            {
                agent: tuple(frozenset(block[v] for v in relation[first[b]]) for b in order)
                for agent, relation in self.considers.items()
            },
            block[self.actual],
        )


def _numbered(keys: Iterable[object]) -> list[int]:
    numbers: dict[object, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


@dataclass(frozen=True)
class Outcome:
    """One way in which an event may go: possible where `pre` holds, with the assignments `post`."""

    pre: Formula = TRUE
    post: Valuation = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """An event model; `actual` gives the index of the outcome that takes place in a given state.

    Attributes:
        outcomes: what may happen, or be thought to happen.
        considers: for each agent and outcome, the outcomes that the agent considers possible when it takes
            place.
        actual: chooses the outcome that takes place.
    """

    outcomes: tuple[Outcome, ...]
    considers: Mapping[str, Relation]
    actual: Callable[[State], int]


def update(state: State, event: Event) -> State:
    """The state after the event, contracted.

    Raises:
        ValueError: if the outcome that takes place is impossible in the actual world, or an agent's view of
            the event is missing.
    """
    missing = set(state.considers) - set(event.considers)
    if missing:
        raise ValueError(
            f"the event does not say what {', '.join(sorted(missing))} considers; name every agent in it"
        )
    start = (state.actual, event.actual(state))
    pairs = [
        (world, index)
        for world in range(len(state))
        for index, outcome in enumerate(event.outcomes)
        if state.holds(outcome.pre, world)
    ]
    number = {pair: i for i, pair in enumerate(pairs)}
    if start not in number:
        raise ValueError("the outcome that takes place has a precondition that fails in the actual world")
    considers = {
        agent: tuple(
            frozenset(
                number[other, seen]
                for other in relation[world]
                for seen in event.considers[agent][index]
                if (other, seen) in number
            )
            for world, index in pairs
        )
        for agent, relation in state.considers.items()
    }
    valuations = tuple({**state.valuations[world], **event.outcomes[index].post} for world, index in pairs)
    return State(valuations, considers, number[start]).contracted()


def change(
    agents: Iterable[str], variable: str, value: str, observers: Iterable[str], secret: Iterable[str] = ()
) -> Event:
    """`variable` becomes `value`, seen by `observers`, who know this of each other; all others believe that
    nothing happened.

    Each `secret` observer sees it too, and sees who else does, but nobody knows of a secret observer.
    """
    open_, hidden = set(observers), sorted(set(secret) - set(observers))
    # Outcomes: as the observers see it, as each secret observer sees it, as it is, and nothing.
    seen, apart, full, skip = (
        0,
        {agent: 1 + i for i, agent in enumerate(hidden)},
        1 + len(hidden),
        2 + len(hidden),
    )

    def view(agent: str, outcome: int) -> frozenset[int]:
        if outcome == skip:
            return frozenset({skip})
        if agent in open_:
            return frozenset({seen})
        if agent in apart and outcome in (full, apart[agent]):
            return frozenset({apart[agent]})
        return frozenset({skip})

    outcomes = (*(Outcome(post={variable: value}) for _ in range(skip)), Outcome())
    return Event(
        outcomes, {a: tuple(view(a, o) for o in range(skip + 1)) for a in agents}, lambda _state: full
    )


def learn(
    agents: Iterable[str],
    variable: str,
    values: Sequence[str],
    learners: Iterable[str],
    aware: Iterable[str] = (),
) -> Event:
    """`learners` come to know the value of `variable`, and know this of each other: they look, or one
    truthfully tells the others.

    `aware` agents notice that the learners learn it, but not what; all others believe that nothing happened.
    `values` are all values that the variable may have.

    Outcomes: for each value u, "it is u and is learnt" (test), and how that is for a learner (assignment of
    u); and nothing.
    """
    who, noticing = set(learners), set(aware)
    n = len(values)
    tests, assigned, skip = frozenset(range(n)), [frozenset({n + i}) for i in range(n)], frozenset({2 * n})
    outcomes = (
        *(Outcome(pre=Fact(variable, u)) for u in values),
        *(Outcome(post={variable: u}) for u in values),
        Outcome(),
    )

    def view(agent: str) -> Relation:
        if agent in who:
            return (*assigned, *assigned, skip)
        return (*(tests if agent in noticing else skip for _ in range(2 * n)), skip)

    def takes_place(state: State) -> int:
        return values.index(state.valuations[state.actual][variable])

    return Event(outcomes, {agent: view(agent) for agent in agents}, takes_place)
