"""Training rows and the network that is trained: each question sees its part of the story and itself, answers
are the logic's, and the network is the one that transformers writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tl_tomsparse.models import EMBEDDED
from tl_tomsparse.stories.generate import generate_scenes
from tl_tomsparse.stories.lexicon import CONTENTS, NAMES, PLACES, THINGS, Draw
from tl_tomsparse.stories.wording import POOLS

TRAINING = Path(__file__).parents[1] / "training"
WIDTH = 192


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, str(TRAINING))
    yield
    sys.path.remove(str(TRAINING))


@pytest.fixture(scope="module")
def data(importable):
    import data

    return data


@pytest.fixture(scope="module")
def model(importable):
    import model

    return model


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def rows(data, tokenizer):
    return data.Rows(tokenizer, WIDTH)


@pytest.fixture(scope="module")
def decoder(data, model, tokenizer):
    torch.manual_seed(0)
    return model.Decoder(model.Shape(len(tokenizer)), len(data.ALL_NAMES)).eval()


@pytest.fixture(scope="module")
def twin(data, model, tokenizer):
    """A decoder by how it tells positions, with no bias at zero: else no test would miss one."""

    def made(positions):
        torch.manual_seed(1)
        decoder = model.Decoder(model.Shape(len(tokenizer), positions), len(data.ALL_NAMES)).eval()
        with torch.no_grad():
            for parameter in decoder.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
        return decoder

    return made


def blocks(row):
    """Tokens of each question, what it sees of the story, and its answer."""
    answers = {at: target for at, target, _ in row.predictions}
    for number in sorted(set(row.block) - {0}):
        where = [i for i, block in enumerate(row.block) if block == number]
        yield where, [row.tokens[i] for i in where], row.reach[where[0]], answers[where[-1]]


@pytest.fixture(scope="module")
def stage(data):
    """The last stage, with every word as it should be."""
    return dataclasses.replace(data.STAGES[-1], variety=0.0, other_names=(0.0, 0.0))


def test_answers_are_those_of_the_logic(stage, rows, tokenizer):
    asked = 0
    for number, scene in enumerate(generate_scenes(80, seed=4, split="train")):
        row = rows.story(scene, Draw("test", number), stage)
        if row is None:
            continue
        assert len(row.tokens) <= WIDTH
        text = tokenizer.decode([t for t, block in zip(row.tokens, row.block) if block == 0])
        assert text == f"<bos> {' '.join(scene.sentences)}"
        for _, tokens, reach, target in blocks(row):
            question, answer = tokenizer.decode(tokens).strip(), tokenizer.decode(target).strip()
            said = tokenizer.decode(row.tokens[:reach]).removeprefix("<bos> ")
            at = next(i for i in range(len(scene.sentences)) if " ".join(scene.sentences[: i + 1]) == said)
            named = [a for a in scene.agents if a in re.findall(r"\w+", question)]
            if question.startswith("Right now, ") and question.endswith(" is"):
                assert answer == ("here" if named[0] in scene.present[at] else "away")
            elif "thinks the" in question and len(named) == 1:
                assert answer == scene.states[at].belief(named, scene.variable)
                asked += 1
    assert asked > 10


@pytest.mark.parametrize("positions", ["rotary", "learned", "alibi"])
def test_a_question_reads_as_if_it_stood_alone_after_its_part_of_the_story(
    positions, data, stage, rows, model, twin, tokenizer
):
    """Hidden states under the block mask equal those of the plain prompt, in transformers' own network."""
    decoder = twin(positions)
    plain = model.to_hugging_face(decoder, tokenizer)
    assert model.Shape.of(decoder.state_dict()) == decoder.shape
    scene = next(generate_scenes(1, seed=8, split="train"))
    row = rows.story(scene, Draw("test", 1), stage)
    batch = data.collate([row], tokenizer.pad_token_id, WIDTH)
    with torch.no_grad():
        packed = decoder.logits(decoder(batch.tokens, batch.mask, batch.positions)[0])[0]
        for where, tokens, reach, _ in blocks(row):
            alone = plain(torch.tensor([row.tokens[:reach] + tokens])).logits[0, -1]
            torch.testing.assert_close(packed[where[-1]], alone, rtol=1e-4, atol=1e-4)
    answers = batch.weight == 1.0
    ends = {(where[-1], target) for where, _, _, target in blocks(row)}
    assert set(zip(batch.source[answers].tolist(), batch.target[answers].tolist())) <= ends
    assert answers.sum() >= 3


@pytest.mark.parametrize("change", ["_spoil", "_recased"])
def test_changed_words_are_never_names_things_or_places(change, stage, rows, tokenizer):
    scene = next(generate_scenes(1, seed=8, split="train"))
    plain = rows.story(scene, Draw("test", 0), stage)
    changed = 0
    for seed in range(30):
        row = dataclasses.replace(plain, tokens=list(plain.tokens))
        getattr(rows, change)(row, Draw("noise", seed), 0.2)
        for before, after in zip(plain.tokens, row.tokens):
            if before != after:
                old, new = (tokenizer.decode([token]) for token in (before, after))
                assert old.strip() not in [*scene.agents, *scene.values]
                assert change == "_spoil" or old.lower() == new.lower()
                changed += 1
    assert changed > 100


def content(text):
    """Things, places and contents of a text in their order; "can" is also a verb."""
    words = re.findall(r"\w+", text.lower())
    return [word for word in words if word in {*THINGS, *PLACES, *CONTENTS} - {"can"}]


def test_stories_keep_who_what_and_where_in_order_whatever_else_changes(data, stage, rows, tokenizer):
    """Names of held-out stories are only replaced by names that held-out stories never have."""
    loud = dataclasses.replace(stage, variety=1.0, other_names=(0.5, 0.5))
    known = invented = 0
    for number, scene in enumerate(generate_scenes(40, seed=5, split="train")):
        row = rows.story(scene, Draw("test", number), loud)
        if row is None:
            continue
        # Token by token: a piece put in place of a small word would run into its neighbour.
        text = " ".join(
            tokenizer.decode([t]).strip() for t, block in zip(row.tokens, row.block) if block == 0
        )
        assert content(text) == content(" ".join(scene.sentences))
        assert not set(re.findall(r"\w+", text)) & set(scene.agents)
        found = [name for name in data.ALL_NAMES[len(NAMES) :] if re.search(rf"\b{name}\b", text)]
        if row.about:
            assert {data.ALL_NAMES[n] for _, names in row.about for n in names} <= set(found)
            assert {data.ALL_NAMES[n] for _, n, _ in row.witnesses} <= set(found)
            known += 1
        else:  # nothing can be asked about a name that the helper head does not have
            assert not row.witnesses
            invented += 1
        assert row.looks or scene.scenario != "transfer"
    assert known > 5
    assert invented > 5


def test_frames_and_loose_words_change_sentences_and_not_what_they_say():
    import variety

    for seed in range(200):
        draw = Draw("frames", seed)
        text = "Anna moves the ball to the box."
        assert "Anna moves the ball to the box" in variety.framed(draw, text)
        loose = variety.loosened(draw, text, frozenset({"Anna", "ball", "box"}), 0.3)
        assert re.findall("Anna|ball|box", loose) == ["Anna", "ball", "box"]
    assert variety.joined("Then", "The ball rolls.") == "Then, the ball rolls."
    assert variety.joined("Then", "Anna rolls.") == "Then, Anna rolls."
    assert variety.joined("Tell me:", "Where is it?") == "Tell me: where is it?"


def test_names_are_all_different_and_no_other_words(data):
    names = [name.lower() for name in data.ALL_NAMES]
    assert len(set(names)) == len(names)
    assert not set(names) & {word for pool in data.LEXICON[1:] for word in pool}


def test_looks_lead_to_the_answer_in_a_sentence_that_all_who_are_asked_about_witness(
    data, stage, rows, tokenizer
):
    looks = 0
    for number, scene in enumerate(
        generate_scenes(60, seed=6, split="train", rounds=2, scenarios=("transfer",))
    ):
        row = rows.story(scene, Draw("test", number), stage)
        if row is None:
            continue
        answers = {at: target for at, target, _ in row.predictions}
        for source, found in row.looks:
            assert row.block[source]
            assert max(found) < row.reach[source]
            assert answers[source] in (row.tokens[at] for at in found)
            looks += 1
        for source, names in row.about:
            question = tokenizer.decode([t for t, b in zip(row.tokens, row.block) if b == row.block[source]])
            assert {data.ALL_NAMES[name] for name in names} == set(scene.agents) & set(
                re.findall(r"\w+", question)
            )
        seen = data.witnesses(scene)
        last = len(scene.sentences) - 1
        for agent in scene.agents:
            belief = scene.states[last].belief((agent,), "place")
            i = data.decided_by(scene, "belief", (agent,), last, belief)
            assert agent in seen[i]
            assert belief in scene.sentences[i]
    assert looks > 100


def test_repetitions_are_supervised_only_when_they_can_be_known(rows):
    for seed in range(20):
        row = rows.chant(Draw("test", seed), (3, 8), (NAMES,))
        assert row.predictions
        assert all(target in row.tokens[:at] for at, target, _ in row.predictions)
        assert all(row.tokens[at + 1] == target for at, target, _ in row.predictions)


def test_look_ups_have_the_answer_in_the_row(rows, tokenizer):
    made = [rows.lookup(Draw("test", seed), (2, 8)) for seed in range(20)]
    assert sum(row is not None for row in made) > 10
    for row in filter(None, made):  # None: too long
        story = [t for t, block in zip(row.tokens, row.block) if block == 0]
        for *_, target in blocks(row):
            assert target in story or tokenizer.decode(target).strip() in ("here", "away")


def test_who_sees_a_move_believes_it_and_nobody_else_learns_anything(data):
    moves = 0
    for scene in generate_scenes(120, seed=3, split="train", scenarios=("transfer",), rounds=2):
        seen = data.witnesses(scene)
        for i, state in enumerate(scene.states):
            if state is None or i == 0 or scene.states[i - 1] is None:
                continue
            before, here = (s.valuations[s.actual]["place"] for s in (scene.states[i - 1], state))
            if here != before:
                for agent in scene.agents:
                    old = scene.states[i - 1].belief((agent,), "place")
                    assert state.belief((agent,), "place") == (here if agent in seen[i] else old)
                moves += 1
    assert moves > 50


def test_heads_that_read_learned_positions_look_back_by_their_offsets(data, model, tokenizer):
    """On the average over what is said: words that are told apart add noise."""
    torch.manual_seed(0)
    decoder = model.Decoder(model.Shape(len(tokenizer), "learned"), len(data.ALL_NAMES))
    seen = []
    handle = decoder.layers[0].self_attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    n = 100
    tokens, mask = torch.randint(3, 3000, (4, n)), torch.triu(torch.full((n, n), -1e9), 1)
    with torch.no_grad():
        decoder(tokens, mask[None, None, None], torch.arange(n)[None])
    handle.remove()
    attention, (x, _, turn) = decoder.layers[0].self_attn, seen[0]
    assert turn is None
    q, k = (part(x).unflatten(-1, (attention.heads, -1)) for part in (attention.q_proj, attention.k_proj))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    for head, offset in enumerate(model.SHIFTS[0]):
        by_distance = [float(scores[:, head].diagonal(-d, 1, 2).mean()) for d in range(n - 20)]
        assert max(range(n - 20), key=by_distance.__getitem__) == offset


def test_shift_heads_look_back_by_their_offsets(model, decoder):
    attention, frequencies = decoder.layers[0].self_attn, decoder.frequencies
    for head, offset in enumerate(model.SHIFTS[0]):
        d_head, half = attention.d_head, len(frequencies)
        q = attention.q_proj.bias[head * d_head : (head + 1) * d_head].detach().double()
        group = head // (attention.heads // attention.groups)
        k = attention.k_proj.bias[group * d_head : (group + 1) * d_head].detach().double()
        query, key = torch.complex(q[:half], q[half:]), torch.complex(k[:half], k[half:])
        logits = [
            float((query * torch.polar(torch.ones(half), distance * frequencies) * key.conj()).real.sum())
            for distance in range(100)
        ]
        assert max(range(100), key=logits.__getitem__) == offset


def test_match_heads_look_at_what_stood_with_the_same_word(data, model, decoder, tokenizer):
    """Before any training: more at the value that followed the same name than at each other value."""
    patterns = {}
    match = decoder.layers[model.MATCH_LAYER]
    rows = data.Rows(tokenizer, 96)
    batch = [rows.chant(Draw("match", seed), (5, 5), (NAMES,)) for seed in range(60)]
    collated = data.collate(batch, tokenizer.pad_token_id, 96)

    def keep(module, inputs):
        x, mask, (cos, sin) = inputs

        def rotated(t):
            a, b = t.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        shape = (*x.shape[:2], module.groups, -1, module.d_head)
        q, k = rotated(module.q_proj(x).view(shape)), rotated(module.k_proj(x).view(shape))
        scores = torch.einsum("bqgih,bkgjh->bgiqk", q, k) * module.d_head**-0.5
        patterns["match"] = (scores + mask).softmax(-1)[:, -1, -1]

    handle = match.self_attn.register_forward_pre_hook(keep)
    with torch.no_grad():
        decoder(collated.tokens, collated.mask, collated.positions)
    handle.remove()
    right, wrong = [], []
    for i, row in enumerate(batch):
        values = {target for _, target, _ in row.predictions}
        for at, target, _ in row.predictions:
            pattern = patterns["match"][i, at]
            seen = [(token, float(pattern[j])) for j, token in enumerate(row.tokens[:at])]
            right += [p for token, p in seen if token == target]
            wrong += [p for token, p in seen if token in values - {target}]
    assert sum(right) / len(right) > 2 * sum(wrong) / len(wrong)


def test_no_two_heads_begin_alike(decoder):
    """They would have the same gradients and never part."""
    for layer in decoder.layers:
        attention = layer.self_attn
        heads = attention.q_proj.weight.detach().view(attention.heads, attention.d_head, -1)
        biases = attention.q_proj.bias.detach().view(attention.heads, -1)
        outs = attention.o_proj.weight.detach().view(-1, attention.heads, attention.d_head).transpose(0, 1)
        for a in range(attention.heads):
            for b in range(a):
                same = [torch.equal(part[a], part[b]) for part in (heads, biases, outs)]
                assert not all(same), (a, b)


def test_wordings_of_training_are_not_the_ones_kept_from_it(data):
    for kind, pool in data.EXTRA.items():
        assert kind in POOLS["seen"]
        assert not set(pool) & set(POOLS["new"].get(kind, ()))
        assert not set(pool) & set(POOLS["seen"][kind])
    before = POOLS["seen"]["intro"]
    with data.more_wordings():
        from tl_tomsparse.stories import wording

        assert set(wording.POOLS["seen"]["intro"]) > set(before)
        assert wording.POOLS["new"] == POOLS["new"]
    assert wording.POOLS["seen"]["intro"] == before


@pytest.fixture
def short(monkeypatch, data):
    """Stages of rows that are made in a moment, then a part on longer ones; snapshots by thousand tokens."""
    import train

    stages = tuple(dataclasses.replace(stage, batch=4, enough=0.0) for stage in data.STAGES[:2])
    for module in (data, train):
        last = dataclasses.replace(stages[1], enough=2.0)
        monkeypatch.setattr(module, "STAGES", (*stages, last))
        monkeypatch.setattr(module, "LONG", (dataclasses.replace(last, at_most=0.004, width=160),))
    monkeypatch.setattr(train, "snapshot", lambda out, n: out / f"snapshot-{int(n) // 1000}.safetensors")
    monkeypatch.setattr(train, "STEPS", 2)
    monkeypatch.setattr(torch, "compile", lambda decoder, **_: decoder)
    monkeypatch.setattr(train, "Chunks", lambda tokenizer, seed, workers: Here(train, tokenizer, seed))
    monkeypatch.setattr(train, "probe", lambda *_: {"paired": 0.5})
    return train


class Here:
    """Rows made in this process."""

    def __init__(self, train, tokenizer, seed):
        self.train, self.tokenizer, self.seed = train, tokenizer, seed

    def __call__(self, stage, chunk):
        return self.train.made(self.tokenizer, stage, self.seed + 1000 + chunk)

    def close(self):
        pass


def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(short, tokenizer, tmp_path):
    def run(folder, millions, after=None):
        folder.mkdir(exist_ok=True)
        tokenizer.save_pretrained(folder / "tokenizer")
        args = argparse.Namespace(
            out=folder,
            positions="rotary",
            millions=millions,
            decay=0.25,
            main_only=False,
            lr=1e-3,
            seed=0,
            device="cpu",
            workers=1,
        )
        if after is not None:
            short.SAVE = 0  # a checkpoint after every chunk
            real, left = short.steps, [0]

            def stops(*args):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                yield from real(*args)

            short.steps = stops
            try:
                for left[0] in after:
                    with pytest.raises(KeyboardInterrupt):
                        short.run(args, tokenizer)
            finally:
                short.steps, short.SAVE = real, 120
        short.run(args, tokenizer)
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return torch.load(folder / "checkpoint-long-0.pt", weights_only=True)["decoder"], log

    whole, log = run(tmp_path / "whole", 0.004)
    parts, other = run(tmp_path / "parts", 0.004, after=(2, 4, 1))
    stages = [entry["stage"] for entry in log if "loss" in entry]
    assert (len(stages), stages.index(3)) == (8, 5)
    assert [(entry["step"], entry["stage"]) for entry in log] == [
        (entry["step"], entry["stage"]) for entry in other
    ]
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert sorted(path.name for path in (tmp_path / "whole").glob("snapshot-*")) == [
        "snapshot-4.safetensors",
        "snapshot-8.safetensors",
    ]


def test_rows_made_by_other_processes_are_those_made_here(data, tokenizer, tmp_path):
    import train

    tokenizer.save_pretrained(tmp_path)
    chunks = train.Chunks(tmp_path, 5, workers=1)
    try:
        for stage, chunk in ((0, 0), (1, 1)):  # what was made ahead for stage 0 is not used
            for found, expected in zip(chunks(stage, chunk), train.made(tmp_path, stage, 1005 + chunk)):
                for field in dataclasses.fields(data.Batch):
                    assert torch.equal(getattr(found, field.name), getattr(expected, field.name))
    finally:
        chunks.close()
