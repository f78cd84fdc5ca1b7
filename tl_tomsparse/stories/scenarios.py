"""Story types as sequences of events: each sentence is written beside the epistemic event that it tells.

* *Unexpected transfer*: a thing is put somewhere and moved, seen by those who are there. Conditions (of the
protagonist):
  `false_belief` (away while it is moved), `no_transfer` (away, but it stays), `present` (sees it moved),
  `informed` (away, then told).
* *Unexpected contents*: a package holds something else than its label says. Conditions: `false_belief` (only
  reads the label), `correct_label` (the label is right), `informed` (told), `open_container` (looks inside).

Every other agent of a story has a fate of its own, so that one story holds true and false beliefs side by
side and a reader cannot answer from the story's type alone. Sentences without a bearing on the answers are
added so that which place is mentioned first, last and most often is a fair draw, whatever the answers are.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from .lexicon import COLOURS, CONTENTS, MATERIALS, NAMES, PACKAGES, PLACES, ROOMS, THINGS, Draw, split_of
from .logic import State, change, learn, update
from .story import Form, Kind, Question
from .wording import Wording, listed, sentence

CONDITIONS: dict[str, tuple[str, ...]] = {
    "transfer": ("false_belief", "no_transfer", "present", "informed"),
    "contents": ("false_belief", "correct_label", "informed", "open_container"),
}
MAX_AGENTS, MAX_PLACES = 5, 3


@dataclass
class Scene:
    """A story in the making: its sentences, and the epistemic state after each of them.

    Attributes:
        agents: everybody, in order of first mention.
        protagonist: whose condition the story's condition is.
        values: the possible places or contents: the options of every question.
        first: the answer to the memory question.
        slots: words that questions need (the thing, or the package).
        sentences, states: of equal length; `states[i]` holds after `sentences[i]`, None while there is
            nothing to ask about.
        inside: who is there now; `present[i]` who was after `sentences[i]`.
    """

    draw: Draw
    wording: Wording
    scenario: str
    condition: str
    agents: list[str]
    protagonist: str
    values: list[str]
    first: str
    slots: dict[str, str]
    sentences: list[str] = field(default_factory=list)
    states: list[State | None] = field(default_factory=list)
    inside: set[str] = field(default_factory=set)
    present: list[frozenset[str]] = field(default_factory=list)

    def tell(self, kind: str, state: State | None, **slots: str) -> None:
        """Add a sentence of a kind and the state after it."""
        self.add(sentence(self.draw, self.wording, kind, **self.slots, **slots), state)

    def add(self, text: str, state: State | None) -> None:
        """Add a sentence as it is and the state after it."""
        self.sentences.append(text)
        self.states.append(state)
        self.present.append(frozenset(self.inside))

    @property
    def state(self) -> State:
        """The last state."""
        state = self.states[-1]
        assert state is not None
        return state

    @property
    def variable(self) -> str:
        """The variable of the logic that the questions are about."""
        return "contents" if self.scenario == "contents" else "place"

    def pad(self, kind: str, slot: str) -> None:
        """Add sentences without a bearing on the answers, so that first, last and most-mentioned values are
        fair draws.

        The first mention is fair already: the sentence that introduces the values draws their order.
        """
        favourite, last = self.draw.choice(self.values), self.draw.choice(self.values)
        counts = Counter(re.findall(r"\w+", " ".join(self.sentences)))
        counts[last] += 1  # the closing sentence below
        # The favourite must lead strictly; at least one filler, so that their presence says nothing.
        need = max(1, max(counts[v] for v in self.values if v != favourite) + 1 - counts[favourite])
        settled = next(i for i, state in enumerate(self.states) if state is not None)
        for _ in range(need):
            self._insert(
                self.draw.below(len(self.sentences) - settled) + settled + 1, kind, **{slot: favourite}
            )
        if self.draw.coin():
            self._insert(self.draw.below(len(self.sentences) - settled) + settled + 1, "neutral")
        self._insert(len(self.sentences), kind, **{slot: last})
        if self.draw.coin(0.3):
            self._insert(len(self.sentences), "neutral")

    def _insert(self, position: int, kind: str, **slots: str) -> None:
        words = {
            "P": self.draw.choice(self.agents),
            "U": self.draw.choice(COLOURS),
            "W": self.draw.choice([m for m in MATERIALS if m not in self.values]),
        }
        text = sentence(self.draw, self.wording, kind, **{**self.slots, **words, **slots})
        self.sentences.insert(position, text)
        self.states.insert(position, self.states[position - 1])
        self.present.insert(position, self.present[position - 1])

    def question(
        self, kind: Kind, agents: tuple[str, ...] = (), *, form: Form = "completion", at: int = -1
    ) -> Question:
        """A question about the state after sentence `at`, answered by the logic.

        Raises:
            ValueError: if the agents are undecided there.
        """
        state = self.states[at]
        assert state is not None
        ask = kind if len(agents) < 2 else f"belief{len(agents)}"
        name = f"{'ask' if form == 'completion' else 'question'}_{ask}"
        if self.scenario == "contents":
            name += "_contents"
        people = dict(zip("PQ", agents))
        text = sentence(self.draw, self.wording, name, **self.slots, **people)
        answer = self.first if kind == "memory" else state.belief(agents, self.variable)
        if answer is None:
            raise ValueError(f"{' about '.join(agents)} is undecided about {self.variable}")
        true = answer == state.belief(agents[1:], self.variable) if agents else None
        return Question(kind, agents, text, form, answer, tuple(self.draw.shuffled(self.values)), true)


def draw_transfer(
    draw: Draw,
    condition: str,
    *,
    split: str,
    wording: Wording,
    n_agents: int,
    n_places: int,
    rounds: int,
    swap: bool,
    distractors: bool,
) -> Scene:
    """An unexpected transfer; earlier rounds (if any) go as they like, the last one follows the condition."""
    protagonist, mover, others = draw_people(draw, split, n_agents)
    while True:
        thing, places = draw.choice(THINGS), draw.sample(PLACES, n_places)
        if split_of(thing, *places) == split and thing not in places:
            break
    if swap:
        places[0], places[1] = places[1], places[0]
    room = draw.choice([r for r in ROOMS if r not in places])
    agents = draw.shuffled([protagonist, mover, *others])
    scene = Scene(
        draw, wording, "transfer", condition, agents, protagonist, places, places[0], {"O": thing, "R": room}
    )
    order = draw.shuffled(range(n_places))
    scene.inside |= set(agents)
    scene.tell("intro", None, L=listed(agents))
    scene.tell("places" if n_places == 2 else "places3", None, **dict(zip("ABC", (places[i] for i in order))))
    scene.tell(
        "put",
        State.common_belief(agents, {"place": places[0]}),
        M=draw.choice((protagonist, mover)),
        A=places[0],
    )
    for left in reversed(range(rounds)):
        fates = {
            agent: draw.choice(("present", "present", "absent", "absent", "informed", "peeking"))
            for agent in agents
        }
        moved = True
        if left == 0:
            fates[protagonist] = {"false_belief": "absent", "no_transfer": "absent"}.get(condition, condition)
            moved = condition != "no_transfer"
        del fates[mover]
        _transfer_round(scene, mover, fates, moved)
    for agent in draw.shuffled(agents):
        if agent not in scene.inside and draw.coin():
            scene.inside.add(agent)
            scene.tell("return", scene.state, P=agent)
    if distractors:
        scene.pad("about_place", "A")
    return scene


def _transfer_round(scene: Scene, mover: str, fates: dict[str, str], moved: bool) -> None:
    draw, inside = scene.draw, scene.inside
    if mover not in inside:
        inside.add(mover)
        scene.tell("return", scene.state, P=mover)
    for agent in draw.shuffled(list(fates)):
        present = fates[agent] == "present"
        if present and agent not in inside:
            inside.add(agent)
            scene.tell("return", scene.state, P=agent)
        elif present and draw.coin(0.6):
            scene.tell("stay", scene.state, P=agent)
        elif not present and agent in inside:
            inside.remove(agent)
            scene.tell("leave", scene.state, P=agent)
    here = scene.state.valuations[scene.state.actual]["place"]
    elsewhere = draw.choice([place for place in scene.values if place != here])
    peeking = draw.shuffled([agent for agent, fate in fates.items() if fate == "peeking"])
    if moved:
        # Until the text has told who peeks, there is nothing to ask about.
        state = update(scene.state, change(scene.agents, "place", elsewhere, inside, peeking))
        scene.tell("move", None if peeking else state, M=mover, A=here, B=elsewhere)
        here = elsewhere
    else:
        state = scene.state
        scene.tell("no_move", state, M=mover, B=elsewhere)
    for i, agent in enumerate(peeking):
        last = i + 1 == len(peeking)
        if moved:
            scene.tell("peek", state if last else None, P=agent, M=mover, B=here)
        else:
            state = update(state, learn(scene.agents, "place", scene.values, {agent}))
            scene.tell("peek_still", state, P=agent, B=here)
    for agent in draw.shuffled([agent for agent, fate in fates.items() if fate == "informed"]):
        state = update(state, learn(scene.agents, "place", scene.values, {agent, mover}))
        scene.tell("tell", state, M=mover, Q=agent, B=here)


def draw_contents(
    draw: Draw, condition: str, *, split: str, wording: Wording, n_agents: int, swap: bool, distractors: bool
) -> Scene:
    """Unexpected contents: `mover` fills the package, the others find it."""
    protagonist, filler, others = draw_people(draw, split, n_agents)
    while True:
        package, values = draw.choice(PACKAGES), draw.sample(CONTENTS, 2)
        if split_of(package, *values) == split:
            break
    if swap:
        values.reverse()
    label, real = (values[0], values[0]) if condition == "correct_label" else values
    finders = draw.shuffled([protagonist, *others])
    slots = {"K": package, "R": draw.choice(ROOMS)}
    scene = Scene(draw, wording, "contents", condition, [filler, *finders], protagonist, values, label, slots)
    first, second = draw.shuffled(values)
    scene.tell("stock", None, M=filler, X=first, Y=second)
    # Everybody expects what the label says; only the filler sees what really goes in.
    expected = State.common_belief(scene.agents, {"contents": label})
    filled = update(expected, change(scene.agents, "contents", real, {filler}))
    for kind in ("fill", "label") if draw.coin() else ("label_first", "fill_after"):
        scene.tell(kind, None, M=filler, X=real if kind.startswith("fill") else label)
    scene.tell("find" if len(finders) > 1 else "find1", filled, L=listed(finders))
    fates = {agent: draw.choice(("closed", "closed", "informed", "open")) for agent in finders}
    fates[protagonist] = {"informed": "informed", "open_container": "open"}.get(condition, "closed")
    for agent in draw.shuffled(finders):
        if fates[agent] == "closed":
            if draw.coin(0.7):
                scene.tell("closed", scene.state, P=agent)
        elif fates[agent] == "open":
            state = update(scene.state, learn(scene.agents, "contents", values, {agent}, scene.agents))
            scene.tell("open", state, P=agent, X=real)
        else:
            state = update(scene.state, learn(scene.agents, "contents", values, {agent, filler}))
            scene.tell("tell_contents", state, M=filler, Q=agent, X=real)
    if distractors:
        scene.pad("about_contents", "X")
    return scene


def draw_people(draw: Draw, split: str, n_agents: int) -> tuple[str, str, list[str]]:
    """The two main people, a pair of this split, and the others."""
    while True:
        names = draw.sample(NAMES, n_agents)
        if split_of(*names[:2]) == split:
            return names[0], names[1], names[2:]
