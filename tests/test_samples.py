"""Tokens, padding and supervised positions."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedTokenizerFast

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import view
from tl_tomsparse.models import load_model
from tl_tomsparse.samples import Samples, option_tokens, story_samples, text_samples


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model("llama")


STORIES = [tiny.story(i) for i in range(4)]


def test_story_samples_read_as_the_story_and_its_answer(model: Any) -> None:
    samples = story_samples(model, STORIES, categories=("false_belief", "reality"))
    assert len(samples) == 8
    assert samples.ids[:3] == ("s0:0", "s0:3", "s1:0")
    expected = [(s, q) for s in STORIES for q in (s.questions[0], s.questions[3])]
    for n, (story, question) in enumerate(expected):
        tokens, mask, supervised = samples.tokens[n], samples.attention_mask[n], samples.supervised[n]
        assert tokens[0] == model.tokenizer.bos_token_id
        assert model.tokenizer.decode(tokens[mask][1:]) == f"{story.prompt(question)} {question.answer}"
        assert model.tokenizer.decode(tokens[supervised]) == f" {question.answer}"


def test_last_token_parity_supervises_the_prompts_own_last_token(model: Any) -> None:
    samples = story_samples(model, STORIES, supervise="last_token", prepend_bos=False)
    for n, story in enumerate(STORIES):
        mask, supervised = samples.attention_mask[n], samples.supervised[n]
        assert model.tokenizer.decode(samples.tokens[n][mask]) == story.prompt(story.questions[0])
        assert supervised.nonzero().flatten().tolist() == [int(mask.sum()) - 1]
    assert not samples.bos
    assert samples.supervise == "last_token"


def test_text_windows_do_not_overlap_and_are_drawn_by_seed(model: Any) -> None:
    text = " ".join(tiny.CORPUS)
    stream = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    samples = text_samples(model, text, length=16, seed=3)
    assert len(samples) == len(stream) // 15
    assert samples.supervised[:, 1:].all()
    assert not samples.supervised[:, 0].any()
    windows = {tuple(row[1:].tolist()) for row in samples.tokens}
    assert windows == {tuple(stream[i : i + 15]) for i in range(0, len(samples) * 15, 15)}
    assert torch.equal(samples.tokens, text_samples(model, text, length=16, seed=3).tokens)
    assert not torch.equal(samples.tokens, text_samples(model, text, length=16, seed=4).tokens)
    assert torch.equal(samples.tokens[:3], text_samples(model, text, n=3, length=16, seed=3).tokens)


def test_the_order_of_windows_is_the_same_on_every_platform(model: Any) -> None:
    samples = text_samples(model, list(tiny.CORPUS), length=12, seed=0, n=3)
    assert samples.ids == ("tokens 33-43", "tokens 22-32", "tokens 11-21")


def test_options_are_told_apart_where_the_tokenizer_joins_words(model: Any) -> None:
    model_view = view(model)
    prompt, (box, basket) = option_tokens(
        model_view, "It is in the", ("box", "basket"), prepend_bos=True, name="x"
    )
    assert model.tokenizer.decode(prompt) == "<bos>It is in the"
    assert (model.tokenizer.decode(box), model.tokenizer.decode(basket)) == (" box", " basket")

    def joins(text: str, **_: Any) -> dict[str, list[int]]:
        # A tokenizer for which the last character before the option belongs to the option's first token.
        return {"input_ids": {"a b": [7, 8], "a b c": [7, 90], "a b d": [7, 91, 92]}[text]}

    fake: Any = SimpleNamespace(tokenizer=joins, bos_token_id=1, n_ctx=9, name="fake")
    found = option_tokens(fake, "a b", ("c", "d"), prepend_bos=False, name="x")
    assert found == ([7], [[90], [91, 92]])


def test_options_that_cannot_be_told_apart_are_refused(model: Any) -> None:
    fake: Any = SimpleNamespace(
        tokenizer=lambda text, **_: {"input_ids": [5] * len(text.split())},
        bos_token_id=1,
        n_ctx=9,
        name="fake",
    )
    with pytest.raises(TomsparseError, match=r"story 3: option 'c' .*other"):
        option_tokens(fake, "a b", ("c", "d"), prepend_bos=True, name="story 3")
    with pytest.raises(TomsparseError, match="prompt is empty"):
        option_tokens(view(model), " ", ("c", "d"), prepend_bos=True, name="x")
    with pytest.raises(TomsparseError, match="option is empty"):
        option_tokens(view(model), "a", ("c", ""), prepend_bos=True, name="x")
    with pytest.raises(TomsparseError, match=f"reads {tiny.N_CTX}"):
        option_tokens(view(model), "xyz " * 100, ("c", "d"), prepend_bos=True, name="x")


def test_what_cannot_be_tokenised_is_refused(model: Any) -> None:
    with pytest.raises(TomsparseError, match="No question"):
        story_samples(model, [])
    with pytest.raises(TomsparseError, match="No question"):
        story_samples(model, STORIES, forms=("question",))
    with pytest.raises(TomsparseError, match="categories='lies' is not one of"):
        story_samples(model, STORIES, categories=("lies",))
    with pytest.raises(TomsparseError, match="supervise='all'"):
        story_samples(model, STORIES, supervise="all")  # type: ignore[arg-type]
    with pytest.raises(TomsparseError, match="enough for 0 windows"):
        text_samples(model, "too short", length=64)
    with pytest.raises(TomsparseError, match="500 are needed"):
        text_samples(model, " ".join(tiny.CORPUS), n=500, length=16)
    with pytest.raises(TomsparseError, match=f"context of {tiny.N_CTX}"):
        text_samples(model, "a b c", length=tiny.N_CTX + 1)
    with pytest.raises(TomsparseError, match="n=0"):
        text_samples(model, " ".join(tiny.CORPUS), n=0, length=16)


def test_models_without_tokenizer_or_bos_are_told_the_cure() -> None:
    model = tiny.model("llama")
    model.tokenizer.bos_token = None
    with pytest.raises(TomsparseError, match="prepend_bos=False"):
        story_samples(model, STORIES)
    assert len(story_samples(model, STORIES, prepend_bos=False)) == 4
    model._tokenizer = None
    with pytest.raises(TomsparseError, match="no tokenizer"):
        story_samples(model, STORIES)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_tokens_that_transformer_lens_invents_are_not_used(kind: str, backend: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny.directory(kind), tmp_path, dirs_exist_ok=True)
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny.build_tokenizer().backend_tokenizer)
    bare.save_pretrained(tmp_path)
    model = load_model(tmp_path, backend=backend, device="cpu")
    assert model.tokenizer.bos_token is not None  # invented, with an id that has no embedding
    with pytest.raises(TomsparseError, match="prepend_bos=False"):
        story_samples(model, STORIES)
    samples = story_samples(model, STORIES, categories=("false_belief", "second_order"), prepend_bos=False)
    assert int(samples.tokens.max()) < model.cfg.d_vocab
    assert not samples.attention_mask.all()
    assert torch.isfinite(view(model).logits(samples.tokens, samples.attention_mask)).all()


def test_rows_are_checked() -> None:
    def build(tokens: int, mask: list[bool], supervised: list[bool]) -> Samples:
        return Samples(
            torch.ones(1, tokens, dtype=torch.long),
            torch.tensor([mask]),
            torch.tensor([supervised]),
            ("x",),
            True,
        )

    assert len(build(3, [True, True, False], [False, True, False])) == 1
    with pytest.raises(TomsparseError, match="do not fit"):
        build(2, [True, True, False], [False, True, False])
    with pytest.raises(TomsparseError, match="right-padded"):
        build(3, [False, True, True], [False, True, False])
    with pytest.raises(TomsparseError, match="Padding"):
        build(3, [True, True, False], [False, False, True])
    with pytest.raises(TomsparseError, match="position 0"):
        build(3, [True, True, False], [True, True, False])
    with pytest.raises(TomsparseError, match="'x' has no supervised"):
        build(3, [True, True, False], [False, False, False])


def test_selecting_and_batching_keep_rows_whole(model: Any) -> None:
    samples = story_samples(model, STORIES, categories=("false_belief", "second_order", "memory"))
    part = samples[[5, 0]]
    assert part.ids == (samples.ids[5], samples.ids[0])
    assert part.tokens.shape[1] == int(part.lengths.max())
    batches = list(samples.batches(120))
    assert sorted(torch.cat(batches).tolist()) == list(range(len(samples)))
    for rows in batches:
        assert samples[rows].tokens.numel() <= 120
    assert [len(rows) for rows in samples.batches(1)] == [1] * len(samples)
    assert "12 x" in repr(samples)
