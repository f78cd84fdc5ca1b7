"""Mistakes that users make, and edges that they reach: right numbers, or one clear refusal.

Beside these, `test_samples.py` has tokenizers without BOS, empty prompts and options, and prompts longer than
the context; `test_odd_models.py` has models of one layer and one head; `test_traps.py` the padding side.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import oracles
import pytest
import tiny
import torch
from torch import Tensor

import tl_tomsparse as tt
from tl_tomsparse.stories.story import Question, Story

every_backend = pytest.mark.parametrize("backend", tiny.BACKENDS)
STORIES = [tiny.story(index) for index in range(4)]
BOS = 1


def fisher(model: Any, samples: Any, **options: Any) -> tt.Sensitivity:
    return tt.fisher_diagonal(model, samples, matrices=("Q", "O"), show_progress=False, **options)


def asking(*options: str, answer: str) -> Story:
    question = Question("reality", (), "The ball is in the", "completion", answer, options)
    return dataclasses.replace(STORIES[0], id="odd", questions=(question,))


def assert_close(found: tt.Sensitivity, expected: Any, tolerance: float = 1e-5) -> None:
    for key in found:
        assert (found[key] - expected[key]).abs().max() <= tolerance * expected[key].abs().max(), key


@pytest.mark.parametrize("wrong", [["a story", "another"], "a story", torch.ones(2, 5, dtype=torch.long)])
def test_strings_and_tokens_where_samples_are_needed(wrong: Any) -> None:
    """A tokenizer may pad strings on either side, and nothing says where their loss is."""
    model = tiny.model()
    for call in (fisher, lambda m, s: tt.perplexity(m, s, show_progress=False)):
        with pytest.raises(tt.TomsparseError, match=r"samples is a \w+; make samples with story_samples"):
            call(model, wrong)
    if not isinstance(wrong, Tensor):
        for call in (tt.story_samples, tt.score_stories):
            with pytest.raises(tt.TomsparseError, match=r"stories has a str; .* text_samples"):
                call(model, wrong)


def test_left_padded_rows() -> None:
    rows = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
    with pytest.raises(tt.TomsparseError, match="right-padded"):
        tt.Samples(rows, rows != 0, (rows != 0) & (rows != 3) & (rows != 5), ("a", "b"), False)


def test_two_bos_tokens() -> None:
    model = tiny.model()
    story = dataclasses.replace(STORIES[0], text=f"<bos>{STORIES[0].text}")
    texts = [tiny.CORPUS[0], f"<bos>{tiny.CORPUS[1]}"]
    for call in (
        lambda bos: tt.story_samples(model, [story], prepend_bos=bos),
        lambda bos: tt.score_stories(model, [story], prepend_bos=bos, show_progress=False),
        lambda bos: tt.text_samples(model, texts, length=8, prepend_bos=bos),
    ):
        with pytest.raises(
            tt.TomsparseError, match=r"begins with the BOS token already; .* prepend_bos=False"
        ):
            call(True)
        call(False)
    own = tt.story_samples(model, [story], prepend_bos=False)
    assert torch.equal(own.tokens, tt.story_samples(model, STORIES[:1]).tokens)


def test_rows_longer_than_the_context() -> None:
    def row(length: int) -> tt.Samples:
        tokens = (torch.arange(length) * 7 % 300 + 3).tolist()
        return tt.Samples.from_rows([tokens], [1], ["row"], bos=False, supervise="text", pad=0)

    for call in (fisher, lambda m, s: tt.perplexity(m, s, show_progress=False)):
        with pytest.raises(tt.TomsparseError, match=f"up to {tiny.N_CTX + 1} tokens .* reads {tiny.N_CTX}"):
            call(tiny.model(), row(tiny.N_CTX + 1))
    full = row(tiny.N_CTX)
    assert_close(fisher(tiny.model(), full), oracles.fisher(tiny.hf_model(), full), 1e-4)


@every_backend
def test_answers_of_several_tokens_and_options_with_one_first_token(backend: Any) -> None:
    """The mean over the answer's tokens in a sensitivity, their sum in a score."""
    model, hf = tiny.model("llama", backend), tiny.hf_model()
    options = ("basket", "basketball court", "basketry")
    story = asking(*options, answer="basketball court")
    tokens = [model.tokenizer(f" {o}", add_special_tokens=False)["input_ids"] for o in options]
    assert len({t[0] for t in tokens}) == 1
    assert min(len(t) for t in tokens[1:]) > 1
    samples = tt.story_samples(model, [story], categories=("reality",))
    assert samples.supervised.sum() == len(tokens[1])
    assert_close(fisher(model, samples), oracles.fisher(hf, samples))
    start = [
        BOS,
        *model.tokenizer(story.prompt(story.questions[0]), add_special_tokens=False)["input_ids"],
    ]
    expected = []
    for option in tokens:
        log_probs = oracles.logits(hf, torch.tensor(start + option)).log_softmax(-1)
        expected.append(sum(float(log_probs[len(start) - 1 + i, t]) for i, t in enumerate(option)))
    (row,) = tt.score_stories(model, [story], show_progress=False).frame.itertuples()
    assert row.logprob_answer == pytest.approx(expected[1], abs=1e-4)
    assert row.chosen == options[max(range(3), key=expected.__getitem__)]


@every_backend
def test_rows_of_padding_alone(backend: Any) -> None:
    """Refused as samples; in your own loss they count as samples without gradient."""
    model = tiny.model("llama", backend)
    samples = tt.story_samples(model, STORIES[:2])
    with pytest.raises(tt.TomsparseError, match="'empty' has no supervised position"):
        tt.Samples(
            torch.cat([samples.tokens, 0 * samples.tokens[:1]]),
            torch.cat([samples.attention_mask, samples.attention_mask[:1] & False]),
            torch.cat([samples.supervised, samples.supervised[:1] & False]),
            (*samples.ids, "empty"),
            True,
        )

    def accumulated(tokens: Tensor, mask: Tensor, supervised: Tensor) -> tt.Sensitivity:
        with tt.FisherAccumulator(model, matrices=("Q", "O")) as accumulator:
            log_probs = model(tokens, attention_mask=mask.long())[:, :-1].log_softmax(-1)
            losses = -log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
            losses.masked_fill(~supervised[:, 1:], 0.0).sum().backward()
        return accumulator.result()

    parts = (samples.tokens, samples.attention_mask, samples.supervised)
    alone = accumulated(*parts)
    beside = accumulated(*(torch.cat([part, torch.zeros_like(part[:1])]) for part in parts))
    assert (alone.n_samples, beside.n_samples) == (2, 3)
    assert_close(beside, {key: value * 2 / 3 for key, value in alone.items()})


@every_backend
def test_prompts_that_come_twice(backend: Any) -> None:
    """Each counts; two stories of one id cannot be told apart in the answers."""
    model = tiny.model("llama", backend)
    one, other = (fisher(model, tt.story_samples(model, [story])) for story in STORIES[:2])
    both = fisher(model, tt.story_samples(model, [STORIES[0], STORIES[1], STORIES[0]]))
    assert_close(both, {key: (2 * one[key] + other[key]) / 3 for key in one})
    with pytest.raises(tt.TomsparseError, match="Two stories have the id 's0'"):
        tt.score_stories(model, [STORIES[0], STORIES[0]], show_progress=False)
    twin = dataclasses.replace(STORIES[0], id="twin")
    frame = tt.score_stories(model, [STORIES[0], twin], show_progress=False).frame
    first, second = (frame[frame.story_id == name].logprob_answer.to_numpy() for name in ("s0", "twin"))
    assert first == pytest.approx(second, abs=1e-5)


@every_backend
def test_batches_of_one(backend: Any) -> None:
    model = tiny.model("llama", backend)
    samples = tt.story_samples(model, STORIES)
    expected = oracles.fisher(tiny.hf_model(), samples)
    assert_close(fisher(model, samples, batch_tokens=1), expected)
    assert_close(fisher(model, samples[[2]]), oracles.fisher(tiny.hf_model(), samples[[2]]))
    found = tt.perplexity(model, samples, batch_tokens=1, show_progress=False).nll
    together = tt.perplexity(model, samples, show_progress=False).nll
    assert found.tolist() == pytest.approx(together.tolist(), rel=1e-5)


@every_backend
@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_one_layer(kind: str, backend: Any) -> None:
    model = tiny.model(kind, backend, n_layers=1)
    assert tt.self_check(model).ok
    samples = tt.story_samples(model, STORIES)
    found = fisher(model, samples)
    assert set(found) == {(0, "Q"), (0, "O")}
    edit = tt.SparseEdit.mean(model, tt.top_fraction(found, 0.05))
    before = tt.score_stories(model, STORIES, show_progress=False).frame.logprob_answer
    with edit.applied(model):
        after = tt.score_stories(model, STORIES, show_progress=False).frame.logprob_answer
    assert not before.equals(after)
    assert tt.frequency_norms(model, samples, show_progress=False).rms.keys() == {(0, "q"), (0, "k")}
