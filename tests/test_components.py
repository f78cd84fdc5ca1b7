"""Parts of an edit: which entries they have, and that what each does is known or measured by hand."""

from __future__ import annotations

from typing import Any

import families
import numpy as np
import pytest
import tiny
import torch
from test_edit import a_mask
from test_rotary import some_samples

import tl_tomsparse as tt
from tl_tomsparse._model import view
from tl_tomsparse.models import load_model

OPTIONS: dict[str, Any] = {"n_random": 3, "n_draws": 200, "eps": 0.2, "show_progress": False}
PARTS = ["Q", "K", "dominant", "slow", "fast", "sink heads"]


def places(mask: tt.SparseMask) -> set[tuple[int, str, int, int, int]]:
    return {
        (row.layer, row.matrix, row.head, row.row, row.col) for row in mask.to_frame().itertuples(index=False)
    }


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_parts_have_the_entries_that_their_names_say(backend: Any) -> None:
    model = tiny.model("llama", backend)  # 4 heads, 2 key-value heads, d_head 8: four frequencies, (m, m + 4)
    mask, samples = a_mask(model, share=0.05), some_samples()
    norms = tt.frequency_norms(model, samples, show_progress=False)
    found = tt.mask_components(model, mask, norms=norms, sink_heads=[(0, 1), (1, 2)])
    assert list(found) == [name for part in PARTS for name in (part, f"not {part}")]
    every = places(mask)
    dominant = {
        (row.layer, row.part.upper(), row.head, row.frequency) for row in norms.dominant().itertuples()
    }
    group = view(model).n_heads // view(model).n_kv_heads
    expected = {
        "Q": {p for p in every if p[1] == "Q"},
        "K": {p for p in every if p[1] == "K"},
        "dominant": {p for p in every if (*p[:3], p[4] % 4) in dominant},
        "slow": {p for p in every if p[1] in "QK" and p[4] % 4 >= 2},
        "fast": {p for p in every if p[1] in "QK" and p[4] % 4 < 2},
        "sink heads": {
            p
            for p in every
            if (p[1] in "QO" and p[:1] + p[2:3] in {(0, 1), (1, 2)})
            or (p[1] in "KV" and p[:1] + p[2:3] in {(0, 1 // group), (1, 2 // group)})
        },
    }
    for name, entries in expected.items():
        assert places(found[name]) == entries, name
        assert places(found[f"not {name}"]) == every - entries, name
        assert 0 < len(entries) < len(every)
    assert not {"dominant", "slow", "fast"} & tt.mask_components(model, mask).keys()


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_all_of_an_effect_is_found_in_the_part_that_makes_it(backend: Any) -> None:
    """Entries at the fast frequencies are zero already, so an edit to zero changes only slow ones."""
    model, samples = tiny.model("llama", backend, dtype=torch.float64), some_samples()
    for layer in range(2):
        for matrix in "QK":
            weight = view(model).weight((layer, matrix))
            for m in (0, 1):
                weight[..., m] = weight[..., m + 4] = 0.0
    edit = tt.SparseEdit.zero(model, a_mask(model, share=0.05).restrict(matrices=("Q", "K")))
    stories = [tiny.story(index) for index in range(6)]
    text = tt.text_samples(model, list(tiny.CORPUS), length=16)
    frame = tt.component_effects(model, samples, edit, stories=stories, text=text, **OPTIONS).frame
    numbers = frame.set_index(["component", "measure"])[["value", "low", "high"]]
    for same in ("slow", "not fast"):
        assert numbers.loc[same].to_numpy() == pytest.approx(numbers.loc["whole"].to_numpy(), abs=1e-12)
    assert numbers.loc["fast"].value.to_numpy() == pytest.approx(0, abs=1e-12)
    assert (numbers.loc["whole"].value.abs() > 1e-6).sum() >= 5
    gap = frame.set_index(["component", "measure"]).to_whole
    assert gap["whole"].to_numpy() == pytest.approx(0, abs=1e-12)
    assert gap["fast"].to_numpy() == pytest.approx(-numbers.value["whole"].to_numpy(), abs=1e-12)
    entries = frame.drop_duplicates("component").set_index("component").entries
    assert entries["slow"] + entries["fast"] == entries["whole"] == len(edit)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_each_part_is_measured_as_if_it_were_the_edit(backend: Any) -> None:
    model, samples = tiny.model("qwen2", backend, dtype=torch.float64), some_samples()
    edit = tt.SparseEdit.mean(model, a_mask(model, share=0.1))
    stories = [tiny.story(index) for index in range(8)]
    text = tt.text_samples(model, list(tiny.CORPUS), length=16)
    found = tt.component_effects(
        model, samples, edit, stories=stories, text=text, match="column", seed=5, **OPTIONS
    )
    frame = found.frame.set_index(["component", "measure"]).sort_index()
    parts = [name for name in ("whole", "K", "slow", "sink heads") if len(found.components[name])]
    assert "slow" in parts
    edits = {name: edit.on(model, found.components[name]) for name in parts}
    alone = tt.position_effects(model, samples, edits, match="column", seed=5, **OPTIONS).summary
    columns = ["value", "low", "high", "random", "random_low", "random_high", "beyond", "as_high"]
    for row in alone.to_dict("records"):
        expected = [row[name] for name in columns]
        assert frame.loc[row["edit"], row["measure"]][columns].tolist() == pytest.approx(expected, abs=1e-9)

    def measured() -> tuple[dict[str, float], float]:
        scores = tt.score_stories(model, stories, show_progress=False).accuracy().set_index("category")
        loss = float(np.log(tt.perplexity(model, text, show_progress=False).value))
        return scores.accuracy.to_dict(), loss

    accuracy, loss = measured()
    assert found.before["log_perplexity"] == pytest.approx(loss)
    for name in parts:
        with edits[name].applied(model):
            one = measured()
        drawn = []
        for seed in (5, 6, 7):
            mask = found.components[name].random_like(seed, match="column")
            with edit.on(model, mask).applied(model):
                drawn.append(measured())
        assert frame.loc[name, "log_perplexity"].value == pytest.approx(one[1] - loss, abs=1e-9)
        for category, before in accuracy.items():
            assert found.before[category] == pytest.approx(before)
            row = frame.loc[name, category]
            assert row.value == pytest.approx(one[0][category] - before)
            assert row.random == pytest.approx(np.mean([each[0][category] for each in drawn]) - before)
            gap = row.value - frame.loc["whole", category].value
            assert row.to_whole == pytest.approx(gap, abs=1e-12)


def test_an_empty_part_says_so() -> None:
    model, samples = tiny.model("llama"), some_samples()
    only = a_mask(model).restrict(matrices=("Q",))
    found = tt.component_effects(model, samples, tt.SparseEdit.zero(model, only), **{**OPTIONS, "eps": 0.9})
    frame = found.frame.set_index("component")
    assert not found.sink_heads
    for name in ("K", "not Q", "sink heads"):
        assert (frame.note[name] == "no entries").all()
        assert (frame.entries[name] == 0).all()
        assert frame.value[name].isna().all()
    assert (frame.note["whole"] == "").all()
    assert frame.value["Q"].tolist() == frame.value["whole"].tolist()
    assert (frame.share["Q"] == 1).all()


def test_without_rotation_there_are_no_parts_by_frequency() -> None:
    model = load_model(families.directory("GPT-2"), device="cpu")
    edit = tt.SparseEdit.zero(model, a_mask(model, share=0.05))
    frame = tt.component_effects(model, some_samples(), edit, **{**OPTIONS, "eps": 0.05}).frame
    notes = frame.drop_duplicates("component").set_index("component").note
    assert (notes[["dominant", "slow", "fast"]] == "no layer has a rotation").all()
    assert (notes[["whole", "Q", "K"]] == "").all()
    assert set(frame.measure) == {"sinks_shifted", "sink_rate", "attention"}
    blind = tt.component_effects(model, some_samples(), edit, **{**OPTIONS, "eps": 0.99})
    assert set(blind.frame.measure) == {"sink_rate"}
    none = blind.frame.query("entries > 0")
    assert (none.value == 0).all()  # no sink, before or after
    missed = 1 - 0.025 ** (1 / len(some_samples()))
    assert none.low.tolist() == pytest.approx([-missed] * len(none))
    assert none.high.tolist() == pytest.approx([missed] * len(none))
    assert "note" in blind.frame
    assert tt.plot.component_effects(blind).layout.annotations[0].text == "share of sinks"


def test_own_components_and_refusals() -> None:
    model, samples = tiny.model("llama"), some_samples()
    mask = a_mask(model)
    edit = tt.SparseEdit.mean(model, mask)
    first = mask.restrict(layers=(0,))
    before = [parameter.clone() for parameter in model.parameters()]
    found = tt.component_effects(model, samples, edit, components={"first layer": first}, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert list(found.components) == ["whole", "first layer"]
    assert set(found.frame.component) == {"whole", "first layer"}
    other = mask.random_like(3)
    for components, message in (
        ({"other": other}, "'other' has [0-9]+ entries that are not in the edit's mask"),
        ({"whole": first}, "called 'whole'"),
    ):
        with pytest.raises(tt.TomsparseError, match=message):
            tt.component_effects(model, samples, edit, components=components, **OPTIONS)
    empty = tt.SparseEdit.mean(model, mask - mask)
    with pytest.raises(tt.TomsparseError, match="no entries; make it from a mask"):
        tt.component_effects(model, samples, empty, **OPTIONS)
    with pytest.raises(tt.TomsparseError, match="has no rule of its own"):
        tt.component_effects(model, samples, edit.inverse, **OPTIONS)
    stories = tt.generate_stories(1, split="dev")
    with pytest.raises(tt.TomsparseError, match="split 'dev'"):
        tt.component_effects(model, samples, edit, stories=stories, **OPTIONS)
    with edit.applied(model), pytest.raises(tt.TomsparseError, match="active edit"):
        tt.component_effects(model, samples, edit, **OPTIONS)
    with pytest.raises(tt.TomsparseError, match="The mask"):
        tt.mask_components(tiny.model("llama", seed=1), mask)
