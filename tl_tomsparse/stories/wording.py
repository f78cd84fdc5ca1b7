"""Sentence templates: for every kind of sentence a pool that training sees and a pool that it never does.

`[a|b]` is a free choice of words, `{x}` a slot. The held-out pool ("new") says the same in other
constructions, so that a test on it asks for the meaning and not for the template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from .lexicon import Draw

Wording = Literal["seen", "new"]
WORDINGS: tuple[Wording, ...] = ("seen", "new")

# slots: P an agent, M the one who acts, Q a hearer, L a list of agents, R room, O thing, A/B places, X/Y
# contents, K package
_SEEN: dict[str, tuple[str, ...]] = {
    # --- unexpected transfer
    # -------------------------------------------------------------------------------------------
    "intro": (
        "{L} are in the {R}.",
        "{L} are [sitting|standing|playing|working|waiting|talking] in the {R}.",
        "{L} are together in the {R} [today|now|this morning|this evening].",
        "[Today|This morning|One day|One evening|After lunch], {L} are in the {R}.",
        "{L} [meet|gather|come together] in the {R}.",
        "In the {R}, {L} are [talking|reading|playing a game|drinking tea].",
        "{L} spend the [day|morning|afternoon|evening] in the {R}.",
        "{L} [enter|walk into|go into] the {R}.",
    ),
    "places": (
        "There is a {A} and a {B}.",
        "There is a {A} and a {B} in the {R}.",
        "The {R} has a {A} and a {B}.",
        "[They see|Everyone sees|Everybody can see] a {A} and a {B}.",
        "A {A} and a {B} are [there|in the room|on the floor|against the wall].",
        "In the {R} [there is|stands] a {A} and also a {B}.",
        "Next to the {A} [is|stands] a {B}.",
        "There is a {A}. There is also a {B}.",
    ),
    "places3": (
        "There is a {A}, a {B} and a {C}.",
        "The {R} has a {A}, a {B} and a {C}.",
        "[They see|Everyone sees|Everybody can see] a {A}, a {B} and a {C}.",
        "A {A}, a {B} and a {C} are [there|in the room|on the floor|against the wall].",
        "There is a {A}. There is also a {B} and a {C}.",
    ),
    "put": (
        "{M} [puts|places|sets|lays|drops|hides|stores|leaves|keeps] the {O} in the {A}.",
        "{M} [puts|places|drops] the {O} [into|inside] the {A}.",
        "{M} [takes|picks up|gets] the {O} and [puts|places|hides] it in the {A}.",
        "{M} has a {O} and [puts|places|drops|hides] it in the {A}.",
        "{M} [opens|walks to|goes to] the {A} and [puts|places|lays] the {O} in it.",
        "{M} [carries|brings] the {O} to the {A} and [puts|drops] it in.",
        "The {O} is [put|placed|stored|hidden] in the {A} by {M}.",
        "[First|Then|Now], {M} [puts|places|hides] the {O} in the {A}.",
    ),
    "leave": (
        "{P} [leaves|exits] the {R}.",
        "{P} [leaves|goes away|walks away|goes out|walks out|goes outside|goes home].",
        "{P} [goes|walks|runs] out of the {R}.",
        "[Then|Now|After that|A little later|Soon], {P} leaves the {R}.",
        "{P} has to [go|leave].",
        "{P} leaves to [buy some bread|get some water|make a call|fetch a book|take a walk].",
        "{P} [says goodbye|waves] and leaves.",
        "{P} [leaves|goes out] for a [while|moment|few minutes].",
    ),
    "stay": (
        "{P} stays in the {R}.",
        "{P} [stays|remains|is still] [there|here|in the room].",
        "{P} does not leave.",
        "{P} [watches|sees everything|is watching|looks on].",
        "{P} stays in the {R} and [watches|looks on|sees everything].",
        "[Then|Now|After that], {P} stays in the {R}.",
    ),
    "move": (
        "{M} moves the {O} from the {A} to the {B}.",
        "{M} moves the {O} to the {B}.",
        "{M} [takes|gets|removes] the {O} out of the {A} and [puts|places|hides] it in the {B}.",
        "{M} [takes|picks up] the {O} from the {A} and [puts|places|drops|lays] it in the {B}.",
        "{M} [puts|places|hides|drops] the {O} in the {B} now.",
        "{M} [opens|goes to] the {A}, takes the {O} and [puts|places] it in the {B}.",
        "[Then|Now|After that|A little later|Soon], {M} moves the {O} to the {B}.",
        "[Then|Now|After that], {M} [takes|gets] the {O} and [puts|places|hides] it in the {B}.",
        "The {O} is moved to the {B} by {M}.",
        "{M} [carries|brings] the {O} from the {A} to the {B}.",
    ),
    "no_move": (
        "{M} [looks at|cleans|wipes|walks past|touches] the {B}.",
        "{M} [opens|closes|paints|repairs] the {B}.",
        "{M} [looks into|opens and closes] the {B} but does not [touch|move|take] the {O}.",
        "{M} [sits down|waits|sings a song|reads a book] next to the {B}.",
        "[Then|Now|After that], {M} [cleans|opens|closes] the {B}.",
    ),
    "return": (
        "{P} [comes back|returns|walks in|comes in again].",
        "{P} [comes back to|returns to|enters|walks into] the {R}.",
        "[Then|Later|Soon|After a while|A little later], {P} [comes back|returns].",
        "{P} is back [now|in the {R}|again].",
    ),
    "tell": (
        "{M} [tells|informs] {Q} that the {O} is in the {B}.",
        "{M} [calls|writes to|meets] {Q} and says that the {O} is in the {B}.",
        "{M} whispers to {Q} that the {O} is [now |]in the {B}.",
        "{M} sends {Q} a message: the {O} is in the {B}.",
        "{Q} hears from {M} that the {O} is in the {B}.",
        "[Then|Later], {M} tells {Q} where the {O} is: in the {B}.",
    ),
    "peek": (
        "{P} secretly sees {M} put the {O} in the {B}.",
        "{P} [looks|peeks] through [the window|a hole|the door] and sees {M} [put|hide] the {O} in the {B}.",
        "[Without a sound|Unseen], {P} watches {M} put the {O} in the {B}.",
        "Nobody notices, but {P} sees {M} put the {O} in the {B}.",
    ),
    "peek_still": (
        "{P} secretly sees the {O} in the {B}.",
        "{P} [looks|peeks] through [the window|a hole|the door] and sees the {O} in the {B}.",
        "[Without a sound|Unseen], {P} looks into the {B} and sees the {O}.",
        "Nobody notices, but {P} sees that the {O} is in the {B}.",
    ),
    # --- unexpected contents
    # -------------------------------------------------------------------------------------------
    "stock": (
        "{M} has some {X} and some {Y}.",
        "{M} [buys|brings|finds|gets] some {X} and some {Y}.",
        "In the {R} there is some {X} and some {Y}.",
        "There is {X} and there is {Y} in the {R}.",
        "{M} is in the {R} with some {X} and some {Y}.",
    ),
    "fill": (
        "{M} fills a {K} with {X}.",
        "{M} [puts|places|hides] the {X} in a {K}.",
        "{M} takes a {K} and [fills it with {X}|puts the {X} in it].",
        "[Secretly|Alone|Early in the morning], {M} fills a {K} with {X}.",
    ),
    "fill_after": (
        "{M} fills the {K} with {X}.",
        "{M} [puts|places|hides] the {X} in the {K}.",
        "{M} takes the {K} and [fills it with {X}|puts the {X} in it].",
        "[Secretly|Alone|Early in the morning], {M} fills the {K} with {X}.",
    ),
    "label": (
        "The label on the {K} says {X}.",
        "The {K} has a label that says {X}.",
        "The {K} is labelled {X}.",
        "On the {K} [is|there is] the word {X}.",
        "Everyone reads the label on the {K}: {X}.",
    ),
    "label_first": (
        "There is a {K}. The label on the {K} says {X}.",
        "There is a {K} with a label that says {X}.",
        "There is a {K}. It is labelled {X}.",
        "[They see|Everyone sees] a {K} with the word {X} on it.",
    ),
    "find": (
        "{L} find the {K}.",
        "{L} [see|look at|come and see] the {K}.",
        "Later, {L} find the {K} in the {R}.",
        "[Then|Soon], {L} come into the {R} and see the {K}.",
    ),
    "find1": (
        "{L} finds the {K}.",
        "{L} [sees|looks at|comes and sees] the {K}.",
        "Later, {L} finds the {K} in the {R}.",
        "[Then|Soon], {L} comes into the {R} and sees the {K}.",
    ),
    "closed": (
        "{P} does not [open it|look inside|open the {K}].",
        "{P} has never [opened|looked into|seen inside] the {K}.",
        "{P} cannot see [inside|what is inside|into the {K}].",
        "{P} only [reads|sees] the label.",
    ),
    "open": (
        "{P} opens the {K} and looks inside.",
        "{P} [opens|looks into] the {K} and sees the {X}.",
        "{P} opens the {K} and finds {X}.",
        "{P} takes a look into the open {K}.",
    ),
    "tell_contents": (
        "{M} whispers to {Q} that the {K} is full of {X}.",
        "{M} [tells|informs] {Q} that there is {X} in the {K}.",
        "{Q} hears from {M} that the {K} is full of {X}.",
        "{M} sends {Q} a message: the {K} is full of {X}.",
    ),
    # --- sentences without a bearing on the answer
    # ---------------------------------------------------------------------
    "neutral": (
        "It is [raining|snowing|sunny|cold|warm|dark|late|early] outside.",
        "{P} is wearing a {U} [hat|shirt|coat|scarf].",
        "{P} likes the {U} [chair|table|door|wall].",
        "A [dog|cat|bird|car] [makes a noise|passes by|is outside].",
        "The [clock|radio|phone] [is on the wall|makes a noise|is old].",
        "{P} [is tired|is happy|is hungry|sings a song|drinks some water].",
        "The {R} is [big|small|quiet|clean|warm].",
    ),
    "about_place": (
        "The {A} is made of {W}.",
        "The {A} is {U}.",
        "The {A} is [old|new|big|small|heavy|clean|very nice].",
        "{P} likes the {A}.",
        "The {A} [stands|is] next to the [window|door|wall|table].",
        "Somebody [bought|made|painted] the {A} long ago.",
        "Everyone knows the {A} well.",
    ),
    "about_contents": (
        "{P} likes {X}.",
        "{P} [never|often|sometimes] buys {X}.",
        "[The shop|The market] sells {X}.",
        "Everyone needs {X} [sometimes|now and then].",
        "{P} [talks|thinks|reads] about {X} [a lot|sometimes].",
        "There is a picture of {X} on the wall.",
    ),
    # --- questions; the answer follows directly
    # ------------------------------------------------------------------------
    "ask_reality": (
        "The {O} is in the",
        "[Really|In fact|In truth|Right now|At this moment|In the end], the {O} is in the",
        "The {O} is [really|now|actually] in the",
        "Now the {O} can be found in the",
    ),
    "ask_memory": (
        "At first the {O} was in the",
        "In the beginning, the {O} was in the",
        "The {O} was first put in the",
        "Before everything else, the {O} was in the",
    ),
    "ask_belief": (
        "{P} thinks the {O} is in the",
        "{P} thinks that the {O} is in the",
        "{P} [believes|is sure|says] that the {O} is in the",
        "{P} will look for the {O} in the",
        "{P} [wants|needs] the {O} and [will look|looks] in the",
        "According to {P}, the {O} is in the",
    ),
    "ask_belief2": (
        "{P} thinks that {Q} thinks the {O} is in the",
        "{P} [believes|is sure|says] that {Q} thinks the {O} is in the",
        "{P} thinks {Q} will look for the {O} in the",
        "{P} [believes|is sure] that {Q} will look for the {O} in the",
        "According to {P}, {Q} thinks the {O} is in the",
    ),
    "question_reality": (
        "Question: Where is the {O} [really|now]? Answer: in the",
        "Where is the {O}? It is in the",
    ),
    "question_memory": (
        "Question: Where was the {O} at first? Answer: in the",
        "Where was the {O} in the beginning? It was in the",
    ),
    "question_belief": (
        "Question: Where does {P} think the {O} is? Answer: in the",
        "Where will {P} look for the {O}? In the",
        "Question: Where does {P} believe the {O} is? Answer: in the",
    ),
    "question_belief2": (
        "Question: Where does {P} think that {Q} thinks the {O} is? Answer: in the",
        "Where does {P} think {Q} will look for the {O}? In the",
    ),
    "ask_reality_contents": (
        "The {K} is full of",
        "[Really|In fact|In truth], the {K} is full of",
        "Inside the {K} there is [really |]some",
        "The {K} [really|actually] contains",
    ),
    "ask_memory_contents": (
        "The label on the {K} says",
        "The {K} is labelled",
        "On the {K} is the word",
    ),
    "ask_belief_contents": (
        "{P} thinks the {K} is full of",
        "{P} thinks that the {K} is full of",
        "{P} [believes|is sure|says] that the {K} is full of",
        "According to {P}, the {K} is full of",
    ),
    "ask_belief2_contents": (
        "{P} thinks that {Q} thinks the {K} is full of",
        "{P} [believes|is sure|says] that {Q} thinks the {K} is full of",
        "According to {P}, {Q} thinks the {K} is full of",
    ),
    "question_reality_contents": (
        "Question: What is in the {K}? Answer:",
        "What is really in the {K}? It is full of",
    ),
    "question_memory_contents": (
        "Question: What does the label on the {K} say? Answer:",
        "What is the word on the {K}? It is",
    ),
    "question_belief_contents": (
        "Question: What does {P} think is in the {K}? Answer:",
        "What does {P} believe is in the {K}? It is full of",
    ),
    "question_belief2_contents": (
        "Question: What does {P} think that {Q} thinks is in the {K}? Answer:",
        "What does {P} believe that {Q} thinks is in the {K}? It is full of",
    ),
}

_NEW: dict[str, tuple[str, ...]] = {
    "intro": (
        "The {R} is where {L} are [today|now].",
        "This is about {L} in the {R}.",
        "{L} have come to the {R}.",
    ),
    "places": (
        "They have a {A} there and a {B}.",
        "[One can see|Here are] a {A} and a {B} [in|inside] the {R}.",
    ),
    "places3": ("They have a {A}, a {B} and a {C} there.", "Here are a {A}, a {B} and a {C}."),
    "put": (
        "In the {A}, {M} [puts|hides] the {O}.",
        "{M} goes and gets the {O}, opens the {A} and drops it inside.",
        "Into the {A} goes the {O}, [put|placed] there by {M}.",
    ),
    "leave": (
        "Out of the {R} goes {P}.",
        "{P} is not in the {R} any more.",
        "[Soon|Then] {P} [walks|goes] away from the {R}.",
    ),
    "stay": ("{P} is here and sees everything.", "In the {R}, {P} is still [watching|there]."),
    "move": (
        "From the {A} to the {B} goes the {O}, moved by {M}.",
        "{M} wants the {O} in the {B}, so {M} moves it there.",
        "{M} takes the {O} away from the {A}; it goes into the {B}.",
    ),
    "no_move": ("At the {B}, {M} waits for a while.", "{M} walks to the {B} and back again."),
    "return": ("Back in the {R} is {P}.", "{P} walks into the {R} again."),
    "tell": ("{Q} is told by {M} that the {O} is in the {B}.", "{M} says to {Q}: the {O} is in the {B}."),
    "peek": (
        "Through the window, {P} sees {M} put the {O} in the {B}.",
        "{P} is unseen but sees {M} put the {O} in the {B}.",
    ),
    "peek_still": (
        "Through the window, {P} sees the {O} in the {B}.",
        "{P} is unseen but sees the {O} in the {B}.",
    ),
    "stock": ("Some {X} and some {Y} are what {M} has.", "{M} comes into the {R} and brings {X} and {Y}."),
    "fill": ("Into a {K} goes the {X}, put there by {M}.", "A {K} is filled with {X} by {M}."),
    "fill_after": ("Into the {K} goes the {X}, put there by {M}.", "The {K} is filled with {X} by {M}."),
    "label_first": (
        "There is a {K}. What its label says is {X}.",
        "{X} is the word on the label of a {K} in the {R}.",
    ),
    "label": ("What the label on the {K} says is {X}.", "{X} is the word on the label of the {K}."),
    "find": ("The {K} is found by {L}.", "{L} walk in and look at the {K}."),
    "find1": ("The {K} is found by {L}.", "{L} walks in and looks at the {K}."),
    "closed": ("What is inside, {P} cannot see.", "The {K} is not opened by {P}."),
    "open": ("The {K} is opened by {P}, who looks inside.", "{P} looks and sees the {X} inside the {K}."),
    "tell_contents": (
        "{Q} is told by {M} that there is {X} in the {K}.",
        "{M} says to {Q}: the {K} is full of {X}.",
    ),
    "neutral": ("Outside it is [cold|warm|dark].", "{P} has a {U} [coat|hat].", "It is quiet in the {R}."),
    "about_place": ("Next to the window is the {A}.", "Of {W} is the {A} made.", "What a nice {A} it is."),
    "about_contents": ("Some people like {X}.", "{X} can be found in the shop."),
    "ask_reality": ("Where the {O} is now is the", "One can find the {O} in the"),
    "ask_memory": ("First of all, the {O} was in the", "The place where the {O} was at first is the"),
    "ask_belief": ("In the mind of {P}, the {O} is in the", "To find the {O}, {P} will go to the"),
    "ask_belief2": (
        "In the mind of {P}, {Q} thinks the {O} is in the",
        "{P} thinks that to find the {O}, {Q} will go to the",
    ),
    "question_reality": ("Where can the {O} be found? In the",),
    "question_memory": ("Where was the {O} first put? In the",),
    "question_belief": ("To find the {O}, where will {P} go? To the",),
    "question_belief2": ("Where is {P} sure that {Q} will look for the {O}? In the",),
    "ask_reality_contents": ("What can be found in the {K} is", "In truth there is in the {K} some"),
    "ask_memory_contents": ("One can read on the {K} the word", "The word on the label of the {K} is"),
    "ask_belief_contents": ("In the mind of {P}, the {K} is full of", "What {P} thinks is in the {K} is"),
    "ask_belief2_contents": ("In the mind of {P}, {Q} thinks the {K} is full of",),
    "question_reality_contents": ("What can be found in the {K}? Some",),
    "question_memory_contents": ("What does everyone read on the {K}? The word",),
    "question_belief_contents": ("What is in the {K}, in the mind of {P}? Some",),
    "question_belief2_contents": ("What is {P} sure that {Q} thinks is in the {K}? Some",),
}

POOLS: Mapping[Wording, Mapping[str, tuple[str, ...]]] = {"seen": _SEEN, "new": _NEW}
_CHOICE = re.compile(r"\[([^\]]*)\]")


def sentence(draw: Draw, wording: Wording, kind: str, **slots: str) -> str:
    """One sentence of a kind, its words chosen by `draw`, its slots filled, its first letter a capital."""
    return told(draw, POOLS[wording][kind], **slots)


def told(draw: Draw, templates: Sequence[str], **slots: str) -> str:
    """The same from templates of one's own."""
    template = draw.choice(templates)
    text = _CHOICE.sub(lambda match: draw.choice(match.group(1).split("|")), template).format(**slots)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]


def listed(names: list[str]) -> str:
    """ "Anna", "Anna and Ben", "Anna, Ben and Clara"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
