"""Names, things and places that stories are made of, and the seeded draws that choose among them.

Every entry is one lower-case word (names: capitalised), so that an answer is one token where the tokenizer
has the word.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Literal, TypeVar

from .._checks import check_choice

T = TypeVar("T")
Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

NAMES = (
    "Adam Agnes Alan Alba Alice Amir Amy Anna Anton Arthur Astrid Aziz Beatrice Ben Bianca Boris Bruno "
    "Carla Carlos Carol Cecilia Chen Clara Claire Colin Dana Daniel David Diana Diego Dora Edith Eduardo "
    "Elena Elias Ella Emil Emma Eric Esther Eva Fatima Felix Fiona Frank Frida Gabriel Gina Grace Greta "
    "Hana Hannah Harold Hassan Heidi Helen Henry Hugo Ian Ida Igor Ines Irene Isaac Ivan Jack Jacob Jane "
    "Jasmin Jonas Julia Karim Karl Kate Kevin Kim Kofi Lars Laura Leila Leo Lily Linda Louis Lucas Lucy "
    "Lydia Magnus Malik Marco Maria Marta Martin Max Maya Mei Mila Mona Nadia Naomi Nick Nina Noah Nora "
    "Oleg Olga Omar Oscar Otto Pablo Paul Paula Peter Petra Philip Priya Quinn Rafael Rahel Ravi Rita "
    "Robert Rosa Ruben Ruth Sally Samuel Sara Sean Silvia Simon Sofia Stella Susan Tara Theo Thomas Tim "
    "Tina Tom Ursula Vera Victor Viola Walter Wanda William Yara Yusuf Zoe"
).split()
THINGS = (
    "apple ball balloon banana bell bottle bracelet brush button cake camera candle card carrot chocolate "
    "coin comb compass cookie crayon cup diamond dice doll drum egg envelope feather flower flute fork "
    "glove hammer key kite knife lamp lemon letter magnet map marble mask medal mirror mug necklace "
    "needle notebook onion orange paintbrush pear pearl pen pencil photo pin plum potato puppet puzzle "
    "ribbon ring rope ruler scissors shell shoe sock spoon stamp stone ticket torch toy umbrella violin "
    "wallet watch whistle"
).split()
PLACES = (
    "backpack bag barrel basin basket bath bin bowl box bucket cabinet can carton case casket chest "
    "closet container cooler crate cupboard drawer dresser folder freezer fridge hamper handbag jar jug "
    "kettle locker oven pail pantry pocket pot pouch purse rucksack sack safe satchel shed sink stove "
    "suitcase tank teapot tin toolbox tray trunk tub vase wardrobe"
).split()
ROOMS = (
    "attic barn basement bathroom bedroom cabin cafe cellar church classroom clinic garage garden gym "
    "hall hallway hotel house kitchen library lobby lounge market museum office park playroom restaurant "
    "school shop station studio study tent theatre workshop"
).split()
CONTENTS = (
    "almonds beads beans biscuits bread butter buttons candy cashews cheese cherries chips coal coffee "
    "cotton crackers crayons dates feathers figs flour glitter grapes gravel honey jam lentils marbles "
    "milk mints mushrooms nails noodles nuts oats olives paper pasta peanuts pebbles pepper popcorn "
    "raisins rice salt sand seeds shells soap spices sugar toffee tomatoes vinegar walnuts wool yarn"
).split()
PACKAGES = "bag barrel bottle box can carton crate flask jar packet pot pouch sack tin tub".split()
COLOURS = "black blue brown golden green grey orange pink purple red silver white yellow".split()
MATERIALS = "clay cloth cork glass leather metal paper plastic straw wood".split()


class Draw:
    """Seeded choices that are the same on every platform and Python version: all come from
    `random.Random.random`.
    """

    def __init__(self, *seed: object) -> None:
        self._random = random.Random("|".join(map(str, seed))).random

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int(self._random() * n)

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def coin(self, p: float = 0.5) -> bool:
        """True with probability p."""
        return self._random() < p

    def sample(self, items: Sequence[T], n: int) -> list[T]:
        """n different items in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(n)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All items in random order."""
        return self.sample(items, len(items))


def split_of(*words: str) -> Split:
    """The split that a combination of words belongs to, whatever their order: train 80 %, dev and test 10 %
    each.
    """
    digest = hashlib.blake2b("|".join(sorted(words)).encode(), digest_size=4).digest()
    share = int.from_bytes(digest, "big") % 10
    return "dev" if share == 0 else "test" if share == 1 else "train"


def check_split(split: str) -> None:
    """Refuse a split that does not exist."""
    check_choice("split", split, SPLITS)
