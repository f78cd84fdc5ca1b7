"""The embedded model's tokenizer: byte-level BPE in which every word of the stories is one token.

Trained on a list of words rather than on text, so that a rare name is a whole token as surely as a frequent
one, and any other text still has a spelling in bytes.
"""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from variety import AFTER, ALL_NAMES, ASKED, BEFORE, WITHIN

from tl_tomsparse.stories import generate_texts, lexicon
from tl_tomsparse.stories.generate import generate_stories
from tl_tomsparse.stories.wording import WORDINGS

SPECIAL = ["<bos>", "<eos>", "<pad>"]


def vocabulary() -> list[str]:
    """Every word that generated stories and texts can contain, and every lexicon entry."""
    words: set[str] = set()
    pools = (ALL_NAMES, lexicon.THINGS, lexicon.PLACES, lexicon.ROOMS, lexicon.CONTENTS, lexicon.PACKAGES)
    for pool in (*pools, lexicon.COLOURS, lexicon.MATERIALS):
        words |= set(pool)
    known = frozenset(words)
    texts = generate_texts(4000, seed=1)
    for wording in WORDINGS:
        for story in generate_stories(8000, seed=1, wording=wording, agents=(2, 5), places=3, rounds=2):
            texts.append(story.text)
            texts.extend(question.text for question in story.questions)
    for text in (*texts, *BEFORE, *AFTER, *WITHIN, *ASKED):
        words |= set(re.findall(r"\w+", text))
    words |= {word.capitalize() for word in words - known}  # any of them may begin a sentence
    return sorted(words)


def build(size: int, folder: Path) -> PreTrainedTokenizerFast:
    """Train the tokenizer, check that every word is one token, and save it as a Hugging Face directory."""
    words = vocabulary()
    tokenizer = Tokenizer(models.BPE())
    # The prefix space makes a word the same token at the start of a text as inside it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    spellings = [word if word in ALL_NAMES else f"{word} {word.lower()}" for word in words]
    tokenizer.train_from_iterator(spellings, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
    )
    split = [word for word in words if len(tokenizer.encode(word, add_special_tokens=False).ids) != 1]
    if split:
        raise ValueError(
            f"{len(split)} words are not one token, {split[:5]} among them; raise the vocabulary size {size}"
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast
