"""What makes training stories differ from each other beyond their templates: other names, frames around
sentences, words left out, put in, replaced or written with another first letter.

A wording never seen has words in odd places, and a reader has names that no list holds. Every change keeps
who, what and where, and their order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tl_tomsparse.stories.lexicon import NAMES, Draw

MORE_NAMES = (
    "Aaron Abigail Ada Adele Adrian Ahmed Aisha Akira Albert Alex Alexander Alfred Ali Alicia Alma "
    "Amanda Amelia Amina Ana Andre Andrea Andrew Andy Angela Anita Annie Arjun Arnold Arya Asha Asher "
    "Audrey Aurora Ava Barbara Barry Beth Betty Bob Brandon Brenda Brian Bridget Caleb Cameron "
    "Camilla Caroline Carter Catherine Charles Charlie Charlotte Chloe Chris Christina Cindy Cleo "
    "Connor Cora Craig Cynthia Daisuke Dan Danielle Daphne Darius Dave Deborah Denise Dennis Derek "
    "Dev Dmitri Dominic Donald Donna Doris Dorothy Douglas Dylan Edgar Edna Edward Edwin Eileen "
    "Eleanor Eli Elisa Elizabeth Ellen Elliot Elsa Emily Enzo Erica Erin Ernest Ethan Eugene Evan "
    "Evelyn Farid Fay Felicia Fernando Finn Flora Florence Francesca Francis Fred Freya Gary Gemma "
    "George Georgia Gerald Gilbert Giovanni Gloria Gordon Graham Greg Gustav Gwen Hamid Hans Harriet "
    "Harry Harvey Hazel Hector Hilda Hiro Holger Howard Ibrahim Imani Indira Ingrid Iris Isabel "
    "Isabella Isla Jackson Jade Jake Jamal James Jamie Jan Janet Jason Javier Jean Jeff Jenna "
    "Jennifer Jenny Jeremy Jerome Jessica Jim Jin Joan Joanna Joe Joel John Johanna Jon Jordan Jorge "
    "Jose Joseph Josh Joshua Joyce Juan Judith Judy Julian Juliet Justin Kaito Karen Katherine Kathy "
    "Katya Kavya Keith Kelly Ken Kenji Khalid Kira Klaus Kumar Kurt Kyle Lana Larry Laurence Lea Lee "
    "Lena Leon Leonard Leonie Lewis Li Liam Liang Lin Lisa Logan Lola Lorenzo Louise Luca Luis Luna "
    "Luther Mabel Madison Manuel Marc Marcel Margaret Margot Marie Marion Mario Marlene Mary Mason "
    "Mateo Matilda Matthew Maurice Meera Megan Mehmet Melissa Mia Michael Michelle Miguel Mike Milo "
    "Mina Mohammed Molly Monica Morgan Moses Muhammad Myra Nadine Nancy Natalie Natasha Nathan Neil "
    "Nell Nelson Nicholas Nicola Nicole Nigel Nikhil Nils Noor Norman Oliver Olivia Ollie Owen Pamela "
    "Patricia Patrick Pauline Pedro Penelope Phoebe Pierre Rachel Raj Rajesh Ralph Ramona Raul "
    "Raymond Rebecca Regina Reza Richard Rick Riley Roberto Rodrigo Roger Roland Roman Ron Ronald "
    "Rosemary Roy Russell Ryan Sabine Said Salma Sam Samantha Samir Sandra Sanjay Santiago Sarah "
    "Sasha Scott Sebastian Selma Serena Sergio Seth Shane Sharon Sheila Shirley Sidney Sigrid Simone "
    "Sonia Sophia Sophie Stanley Stefan Stephanie Stephen Steve Steven Stuart Suresh Susanna Sven "
    "Sylvia Tamara Tanya Ted Teresa Terry Thea Theresa Tobias Todd Tommy Tony Tracy Ulrich Uma "
    "Valentina Valerie Vanessa Veronica Vikram Vincent Virginia Vivian Wei Wendy Wesley Xavier Yan "
    "Yasmin Yoko Yolanda Youssef Yuki Yuri Yvonne Zachary Zahra Zara Zeynep"
).split()
ALL_NAMES = (*NAMES, *MORE_NAMES)
SYLLABLES = (
    "ba be bo da de di dra fa fe fi ga ge go gri ha hi jo ka ke ki ko la le li lo lu ma me mi mo na ne ni no "
    "pa pe po ra re ri ro ru sa se shi so sta ta te ti to tra va ve vi wa we ya yo za ze zi zo"
).split()
ENDINGS = "l m n r s th x ck lla nna rk sh tte".split()

BEFORE = (
    "Then|And then|Now|Next|Soon|Later|Later on|A little later|A bit later|After that|After this|And so|So|"
    "Meanwhile|At this point|At that moment|In the meantime|By and by|One moment later|Some time later|"
    "After some time|A minute later|A few minutes later|Not long after that|At once|All at once|Suddenly|"
    "As it happens|As usual|Of course|Once more|First|At last|In the end|Well|Look|Listen|You see|"
    "This is what happens next:|Here is what happens:|It so happens that|One can see that|It is a fact that|"
    "Everybody can tell that|We read that|As the story goes|With a smile|In silence|In a hurry|"
    "Without any noise|On this day|That morning|That evening|While the sun shines|While it rains outside|"
    "While music plays|When the clock strikes|After a short rest|To the sound of rain|Believe it or not|"
    "Strange as it is|For some reason|For no reason|On a whim|By chance"
).split("|")
AFTER = (
    "of course|as usual|it seems|they say|you see|in silence|with a smile|in a hurry|without any noise|"
    "as always|for some reason|this time|that day|once more|if you like|by chance|at once|as planned|"
    "just like that|and that is that|quite slowly|rather quickly|with great care|as we know"
).split("|")
WITHIN = (
    "quietly|quickly|slowly|now|then|also|just|simply|really|calmly|suddenly|gladly|soon|next|carefully|"
    "too|indeed|actually|perhaps|usually|surely|once|yet"
).split("|")
ASKED = (
    "So|Tell me:|Question:|Now|Well|Think about it:|And|What do you say?|Let us see:|In this story|"
    "At this point|Right now|Here is a question.|One more thing:|At this moment|To be sure:"
).split("|")


def joined(before: str, sentence: str) -> str:
    """ "Then" and "The ball rolls." are "Then, the ball rolls."; names keep their capital."""
    first = re.match(r"\w+", sentence)
    name = first is None or first[0] in ALL_NAMES or first[0] not in COMMON_STARTS
    rest = sentence if name or before.endswith(("?", ".")) else sentence[0].lower() + sentence[1:]
    comma = "" if before.endswith((":", "?", ".", "that", "so", "And", "then")) else ","
    return f"{before}{comma} {rest}"


COMMON_STARTS = {
    word.capitalize()
    for word in (
        "a after all an and as at away because before behind but by everybody everyone for from here "
        "how if in inside into is it near next no nobody not now of off on one only out outside people "
        "secretly some somebody soon that the then there they this through to under until up what when "
        "where which while who with without"
    ).split()
}
"""Words that a sentence may begin with and that lose their capital inside it."""


def framed(draw: Draw, sentence: str) -> str:
    """The same sentence with something before it, after it, or both."""
    kind = draw.below(4)
    if kind in (0, 1, 3):
        sentence = joined(draw.choice(BEFORE), sentence)
    if kind in (2, 3) and sentence.endswith("."):
        comma = "," if draw.coin() else ""
        sentence = f"{sentence[:-1]}{comma} {draw.choice(AFTER)}."
    return sentence


def loosened(draw: Draw, sentence: str, kept: frozenset[str], often: float) -> str:
    """Some words that are not `kept` are left out, and small adverbs are put in between."""
    words, out = sentence.split(" "), []
    for i, word in enumerate(words):
        plain = re.sub(r"\W", "", word)
        if i and draw.coin(often):
            out.append(draw.choice(WITHIN))
        if 0 < i < len(words) - 1 and plain == word and plain not in kept and draw.coin(often):
            continue
        out.append(word)
    return " ".join(out)


def invented(draw: Draw) -> str:
    """A name that no list holds, of several tokens: "Drako", "Melith"."""
    ends = draw.choice(ENDINGS) if draw.coin() else ""
    return "".join(draw.choice(SYLLABLES) for _ in range(2 + draw.coin(0.3))).capitalize() + ends


@dataclass(frozen=True)
class Renaming:
    """Other names for the agents of a story. None of them occurs in held-out stories, so no held-out pair of
    names is trained.
    """

    names: dict[str, str]

    @classmethod
    def drawn(cls, draw: Draw, agents: tuple[str, ...], known: float, new: float) -> Renaming:
        """Listed names with chance `known`, invented ones with chance `new`, else as they are."""
        chance = draw.below(1000) / 1000
        if chance < known:
            return cls(dict(zip(agents, draw.sample(MORE_NAMES, len(agents)))))
        if chance < known + new:
            return cls({agent: invented(draw) for agent in agents})
        return cls({})

    def __call__(self, text: str) -> str:
        """The text with the other names."""
        return re.sub(r"[A-Z]\w+", lambda found: self.names.get(found[0], found[0]), text)

    def number(self, agent: str) -> int | None:
        """The agent's place in ALL_NAMES; None for an invented name."""
        name = self.names.get(agent, agent)
        return ALL_NAMES.index(name) if name in ALL_NAMES else None
