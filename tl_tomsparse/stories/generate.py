"""Seeded stories with computed answers and matched controls.

Half of the stories are false-belief ones, the controls share the other half: over the protagonists' belief
questions the answer is reality as often as not. Stories come in twins (2k and 2k + 1) that differ only in
that the two objects change roles; both have the id of the even one as their `group`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .._checks import TomsparseError, check_choice, check_positive
from .lexicon import Draw, check_split
from .scenarios import CONDITIONS, MAX_AGENTS, MAX_PLACES, Scene, draw_contents, draw_transfer
from .story import Form, Question, Story
from .wording import WORDINGS, Wording

SCENARIOS = tuple(CONDITIONS)
FORMS: tuple[Form, ...] = ("completion", "question")


def generate_stories(
    n: int,
    *,
    seed: int = 0,
    split: str = "train",
    scenarios: Sequence[str] = SCENARIOS,
    conditions: Sequence[str] | None = None,
    wording: Wording = "seen",
    agents: tuple[int, int] = (2, 4),
    places: int = 2,
    rounds: int = 1,
    forms: Sequence[Form] = FORMS,
    second_order: int = 2,
    distractors: bool = True,
) -> list[Story]:
    """Generate stories about who believes what, with every answer computed by dynamic epistemic logic.

    Each story asks about reality, memory, the belief of every agent, and some beliefs about beliefs. The same
    arguments give the same stories on every platform, and a longer list begins with the shorter one.

    Args:
        n: how many stories.
        seed: of all draws.
        split: "train", "dev" or "test". No pair of main names and no combination of thing and places (package
            and contents) occurs in two splits.
        scenarios: "transfer", "contents" or both.
        conditions: restrict to some conditions, each equally often; by default false belief is half of the
            stories.
        wording: "seen" are the templates that the embedded model was trained on, "new" are kept from it.
        agents: smallest and largest number of agents, 2 to 5.
        places: number of places in transfer stories, 2 or 3; this is also the number of options.
        rounds: how often things may be moved in transfer stories.
        forms: "completion", "question" or both (drawn for each question).
        second_order: number of second-order questions in each story, at most.
        distractors: add sentences without a bearing on the answers. Without them, where a word stands gives
            answers away.

    Returns:
        The stories, in a fixed order.

    Raises:
        TomsparseError: for a value outside the ranges above.
    """
    if n < 1:
        raise TomsparseError(f"n={n!r} stories were asked for; ask for at least 1.")
    for form in forms:
        check_choice("forms", form, FORMS)
    scenes = generate_scenes(
        n,
        seed=seed,
        split=split,
        scenarios=scenarios,
        conditions=conditions,
        wording=wording,
        agents=agents,
        places=places,
        rounds=rounds,
        distractors=distractors,
    )
    prefix = f"{split}-{seed}-{'' if wording == 'seen' else 'new-'}"
    return [
        as_story(scene, tuple(_questions(scene, forms, second_order)), prefix, i, split)
        for i, scene in enumerate(scenes)
    ]


def as_story(scene: Scene, questions: tuple[Question, ...], prefix: str, i: int, split: str) -> Story:
    """The i-th scene of a set as a story; scenes 2k and 2k + 1 are twins."""
    return Story(
        id=f"{prefix}{i:05d}",
        scenario=scene.scenario,
        condition=scene.condition,
        protagonist=scene.protagonist,
        split=split,
        wording=scene.wording,
        text=" ".join(scene.sentences),
        agents=tuple(scene.agents),
        questions=questions,
        group=f"{prefix}{i - i % 2:05d}",
    )


def generate_scenes(
    n: int,
    *,
    seed: int,
    split: str,
    scenarios: Sequence[str] = SCENARIOS,
    conditions: Sequence[str] | None = None,
    wording: Wording = "seen",
    agents: tuple[int, int] = (2, 4),
    places: int = 2,
    rounds: int = 1,
    distractors: bool = True,
) -> Iterator[Scene]:
    """The scenes that [`generate_stories`][] makes stories of: sentences, and the state after each."""
    check_split(split)
    check_choice("wording", wording, WORDINGS)
    for scenario in scenarios:
        check_choice("scenarios", scenario, SCENARIOS)
    check_positive("rounds", rounds)
    fewest, most = agents
    if not 2 <= fewest <= most <= MAX_AGENTS:
        raise TomsparseError(
            f"agents={agents!r} must be two numbers, smallest and largest, from 2 to {MAX_AGENTS}."
        )
    if not 2 <= places <= MAX_PLACES:
        raise TomsparseError(f"places={places!r} must be from 2 to {MAX_PLACES}.")
    slots = _schedule(scenarios, conditions)
    for i in range(n):
        twin = i // 2
        draw = Draw("tl_tomsparse", seed, split, wording, twin)
        scenario, condition = slots[twin % len(slots)]
        n_agents = fewest + draw.below(most - fewest + 1)
        swap = i % 2 == 1
        if scenario == "transfer":
            yield draw_transfer(
                draw,
                condition,
                split=split,
                wording=wording,
                n_agents=n_agents,
                n_places=places,
                rounds=rounds,
                swap=swap,
                distractors=distractors,
            )
        else:
            yield draw_contents(
                draw,
                condition,
                split=split,
                wording=wording,
                n_agents=n_agents,
                swap=swap,
                distractors=distractors,
            )


def _schedule(scenarios: Sequence[str], conditions: Sequence[str] | None) -> list[tuple[str, str]]:
    if conditions is not None:
        known = {condition for scenario in scenarios for condition in CONDITIONS[scenario]}
        for condition in conditions:
            check_choice("conditions", condition, sorted(known))
        slots = [(s, c) for c in conditions for s in scenarios if c in CONDITIONS[s]]
    else:
        slots = [
            (scenario, condition)
            for control in range(3)
            for belief in (True, False)
            for scenario in scenarios
            for condition in (CONDITIONS[scenario][0 if belief else 1 + control],)
        ]
    if not slots:
        raise TomsparseError(
            f"scenarios={scenarios!r}, conditions={conditions!r} leave no story to tell; "
            "name at least one of each."
        )
    return slots


def _questions(scene: Scene, forms: Sequence[Form], second_order: int) -> Iterator[Question]:
    draw = scene.draw
    pairs = [(a, b) for a in scene.agents for b in scene.agents if a != b]
    yield scene.question("reality", form=draw.choice(forms))
    yield scene.question("memory", form=draw.choice(forms))
    for agent in draw.shuffled(scene.agents):
        yield scene.question("belief", (agent,), form=draw.choice(forms))
    for pair in draw.sample(pairs, min(second_order, len(pairs))):
        yield scene.question("belief", pair, form=draw.choice(forms))
