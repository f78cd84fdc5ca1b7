"""Choice of the largest entries, the algebra of masks, and random masks."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from tl_tomsparse import _draws, _select
from tl_tomsparse._channels import channels, flat_index, n_channels
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import MATRICES, Key, ModelIdentity, view
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.ranking import rank_entries, top_fraction

IDENTITY = ModelIdentity("tiny", "f" * 32, "raw", "4.3.0", 2, 4, 2, 6, 3, 10)
OTHER = ModelIdentity("else", "0" * 32, "raw", "4.3.0", 2, 4, 2, 6, 3, 10)
SHAPES: dict[Key, tuple[int, ...]] = {
    (0, "Q"): (4, 6, 3),
    (0, "K"): (2, 6, 3),
    (0, "out"): (10, 6),
    (1, "O"): (4, 3, 6),
    (1, "in"): (6, 10),
}


def a_sensitivity(values: Mapping[Key, torch.Tensor], identity: ModelIdentity = IDENTITY) -> Any:
    return SimpleNamespace(values=values, identity=identity)


def a_mask(seed: int = 0, share: float = 0.2, identity: ModelIdentity = IDENTITY) -> SparseMask:
    generator = np.random.default_rng(seed)
    entries = {
        key: torch.from_numpy(np.flatnonzero(generator.random(int(np.prod(shape))) < share))
        for key, shape in SHAPES.items()
    }
    return SparseMask(identity, SHAPES, entries)


def triples(mask: SparseMask) -> set[tuple[int, str, int]]:
    return {(*key, i) for key, index in mask.entries.items() for i in index.tolist()}


# ---- the choice


def oracle(flats: list[torch.Tensor], k: int) -> list[tuple[int, int]]:
    order = sorted((-v, t, i) for t, flat in enumerate(flats) for i, v in enumerate(flat.tolist()))
    return [(t, i) for _, t, i in order[:k]]


@pytest.mark.parametrize("levels", [1, 2, 5, 40, None], ids=lambda n: f"{n or 'all'}-values")
@pytest.mark.parametrize("sizes", [(5000,), (4096, 7, 1, 3001), (64,) * 50, (1,)], ids=str)
def test_largest_equals_a_full_sort_with_ties_by_lowest_index(
    sizes: tuple[int, ...], levels: int | None
) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    flats = [torch.rand(size, generator=generator) ** 4 for size in sizes]
    if levels:
        flats = [(flat * levels).round() / levels for flat in flats]
    total = sum(sizes)
    for k in sorted({0, 1, min(3, total), total // 2048, total // 512, total // 100, total // 2, total}):
        tensor, index = _select.largest(flats, k)
        assert list(zip(tensor.tolist(), index.tolist())) == oracle(flats, k), k


def test_blocks_are_used_and_hold_few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = _select._candidates

    def counted(*args: Any) -> torch.Tensor:
        sizes.append(len(found := original(*args)))
        return found

    monkeypatch.setattr(_select, "_candidates", counted)
    _select.largest([torch.zeros(100_000)], 20)  # all equal: the worst case for ties
    _select.largest([torch.rand(100_000)], 20)
    assert len(sizes) == 2
    assert max(sizes) <= 20 * 128 + 128


def test_the_choice_does_not_depend_on_threads() -> None:
    flat = (torch.rand(300_000, generator=torch.Generator().manual_seed(0)) * 50).round()
    before = torch.get_num_threads()
    chosen = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            chosen.append(_select.largest([flat], 100)[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[0], chosen[2])


@pytest.mark.parametrize("quota", ["matrix", "global"])
def test_top_fraction_takes_exactly_the_rounded_share(quota: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    values = {key: torch.rand(shape, generator=generator) for key, shape in reversed(SHAPES.items())}
    ranked = rank_entries(a_sensitivity(values), kappa_max=1.0, quota=quota)
    total = sum(value.numel() for value in values.values())
    for kappa in (0.0, 1e-5, 1 / 72, 0.02, 0.05, 1 / 3, 0.5, 0.999, 1.0):
        mask = ranked.top(kappa)
        assert mask == top_fraction(a_sensitivity(values), kappa, quota=quota)
        if quota == "matrix":
            for key, value in values.items():
                expected = oracle([value.flatten()], round(kappa * value.numel()))
                assert mask.entries[key].tolist() == sorted(i for _, i in expected)
        else:
            chosen = oracle([values[key].flatten() for key in ranked.shapes], round(kappa * total))
            assert triples(mask) == {(*list(ranked.shapes)[t], i) for t, i in chosen}
    assert list(mask.shapes) == [(0, "Q"), (0, "K"), (0, "out"), (1, "O"), (1, "in")]
    assert len(repr(ranked).splitlines()) == 1


def test_halves_go_to_the_even_number_and_one_entry_is_one_entry() -> None:
    values = a_sensitivity({(0, "in"): torch.arange(50.0).view(5, 10)})
    assert [len(top_fraction(values, kappa)) for kappa in (0.01, 0.02, 0.03, 0.05, 0.07)] == [0, 1, 2, 2, 4]
    assert top_fraction(values, 0.02).entries[0, "in"].tolist() == [49]


def test_bad_kappas_quotas_and_sensitivities_are_refused() -> None:
    values = {(0, "Q"): torch.rand(4, 6, 3), (3, "out"): torch.rand(10, 6)}
    for kappa in (-1e-9, 1.0001, float("nan"), float("inf")):
        with pytest.raises(TomsparseError, match=r"kappa=.*outside \[0, 1\]"):
            top_fraction(a_sensitivity(values), kappa)
    with pytest.raises(TomsparseError, match="quota='layer' is not one of"):
        top_fraction(a_sensitivity(values), 0.1, quota="layer")  # type: ignore[arg-type]
    with pytest.raises(TomsparseError, match=r"above kappa_max=0\.1"):
        rank_entries(a_sensitivity(values), kappa_max=0.1).top(0.2)
    for bad in (float("nan"), float("inf"), -float("inf"), -1.0):
        for place in (0, 33, 59):
            broken = {key: value.clone() for key, value in values.items()}
            broken[3, "out"].view(-1)[place] = bad
            for kappa in (0.0, 0.01, 1.0):
                with pytest.raises(TomsparseError, match=rf"matrix out of layer 3 has the value {bad}"):
                    top_fraction(a_sensitivity(broken), kappa)


# ---- the algebra


def test_algebra_equals_that_of_python_sets() -> None:
    a, b = a_mask(0), a_mask(1)
    assert triples(a - b) == triples(a) - triples(b)
    assert triples(a & b) == triples(a) & triples(b)
    assert triples(a | b) == triples(a) | triples(b)
    assert len(a | b) == len(triples(a | b)) > len(a) > 0
    assert (a - b) | (a & b) == a != b
    assert a | b == b | a
    assert a - a == SparseMask(IDENTITY, {}, {})
    assert a != "a mask"
    part = a.restrict(matrices=["Q"])
    assert part | a == a == a | part
    assert part & a == part == a & part
    assert list((part & a).shapes) == [(0, "Q")]
    assert a - part == a.restrict(matrices=["K", "O", "in", "out"])
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)
    with pytest.raises(TypeError, match="unsupported operand"):
        a - {1}  # type: ignore[operator]


@pytest.mark.parametrize("operation", ["__sub__", "__and__", "__or__"])
def test_masks_of_different_weights_do_not_combine(operation: str) -> None:
    with pytest.raises(TomsparseError, match=r"'tiny' .*ffffffffffff.*'else' .*000000000000.*from one model"):
        getattr(a_mask(), operation)(a_mask(identity=OTHER))
    assert a_mask() != a_mask(identity=OTHER)
    renamed = ModelIdentity("renamed", "f" * 32, "raw", "3.9.0", 2, 4, 2, 6, 3, 10)
    assert a_mask() == a_mask(identity=renamed)
    assert len(a_mask() - a_mask(identity=renamed)) == 0


def test_masks_are_frozen_values_and_check_their_entries() -> None:
    mask = SparseMask(
        IDENTITY, {(0, "out"): (10, 6)}, {(0, "out"): torch.tensor([5, 3, 5], dtype=torch.int32)}
    )
    assert mask.entries[0, "out"].tolist() == [3, 5]
    with pytest.raises(AttributeError):
        mask.entries = {}  # type: ignore[misc]
    with pytest.raises(TypeError):
        mask.entries[0, "out"] = torch.tensor([1])  # type: ignore[index]
    for bad in (-1, 60):
        with pytest.raises(TomsparseError, match=f"Index {bad} is outside matrix out of layer 0"):
            SparseMask(IDENTITY, {(0, "out"): (10, 6)}, {(0, "out"): torch.tensor([bad, 2])})
    with pytest.raises(TomsparseError, match="no shape"):
        SparseMask(IDENTITY, {}, {(0, "out"): torch.tensor([1])})
    with pytest.raises(TomsparseError, match="'W_Q' is not one of Q, K"):
        SparseMask(IDENTITY, {(0, "W_Q"): (10, 6)}, {})


def test_frames_and_counts_agree_with_the_entries() -> None:
    mask = a_mask()
    frame = mask.to_frame()
    assert list(frame.columns) == ["layer", "matrix", "head", "row", "col", "flat"]
    assert len(frame) == len(mask)
    for row in frame.itertuples():
        shape = SHAPES[row.layer, row.matrix]
        place = (row.row, row.col) if len(shape) == 2 else (row.head, row.row, row.col)
        assert np.ravel_multi_index(place, shape) == row.flat
    for by in ("layer", "matrix"):
        counted = mask.counts(by=by)  # type: ignore[arg-type]
        assert counted.to_dict() == frame.groupby(by).size().to_dict()
        assert counted.sum() == len(mask)
    heads = mask.counts(by="head")
    expected = frame.dropna(subset="head").groupby(["layer", "matrix", "head"]).size()
    assert heads[heads > 0].to_dict() == expected.to_dict()
    assert len(heads) == 4 + 2 + 4
    with pytest.raises(TomsparseError, match="by='row'"):
        mask.counts(by="row")  # type: ignore[arg-type]
    empty = SparseMask(IDENTITY, {}, {})
    assert list(empty.to_frame().columns) == list(frame.columns)
    assert [len(empty.counts(by=by)) for by in ("layer", "head", "matrix")] == [0, 0, 0]  # type: ignore[arg-type]
    assert (empty.to_frame().dtypes == frame.dtypes).all()


def test_restrict_keeps_layers_matrices_and_heads() -> None:
    mask = a_mask(share=0.5)
    kept = mask.restrict(layers=[0], heads=[1, 3])
    rows = mask.to_frame().query("layer == 0 and head in [1, 3]")
    assert triples(kept) == {(r.layer, r.matrix, r.flat) for r in rows.itertuples()}
    assert list(kept.shapes) == [(0, "Q"), (0, "K")]
    pairs = mask.restrict(heads=[(0, 1), (0, 3), (1, 0)])
    assert pairs.restrict(layers=[0]) == kept
    assert pairs.restrict(layers=[1]) == mask.restrict(layers=[1], heads=[0])
    assert mask.restrict() == mask
    assert len(mask.restrict(layers=[])) == 0
    with pytest.raises(TomsparseError, match="matrices='W_Q'"):
        mask.restrict(matrices=["W_Q"])


def test_representations_are_small() -> None:
    mask = a_mask()
    assert repr(mask) == f"SparseMask({len(mask)} of 300 weights in Q, K, O, in, out of 2 layers of tiny)"
    page = mask._repr_html_()
    assert "<script" not in page
    assert page.count("<tr>") == 3
    assert "no matrix of 0 layers" in repr(SparseMask(IDENTITY, {}, {}))


def test_save_and_load(tmp_path: Path) -> None:
    mask = a_mask()
    mask.save(tmp_path / "a.safetensors")
    a_mask().save(tmp_path / "b.safetensors")
    loaded = SparseMask.load(tmp_path / "a.safetensors")
    assert loaded == mask
    assert loaded.identity == mask.identity
    assert loaded.shapes == mask.shapes
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    SparseMask(IDENTITY, {}, {}).save(tmp_path / "empty.safetensors")
    assert len(SparseMask.load(tmp_path / "empty.safetensors")) == 0
    broken = {"kind": "tomsparse.mask", "identity": IDENTITY.to_dict(), "shapes": {"0.Q": [2, 2]}}
    from tl_tomsparse._artifacts import write_safetensors

    for header in ({**broken, "shapes": {}}, {**broken, "identity": {}}, {"kind": "tomsparse.mask"}, broken):
        write_safetensors(tmp_path / "c.safetensors", {"0.Q": torch.tensor([7])}, header)
        with pytest.raises(TomsparseError, match="is a damaged mask"):
            SparseMask.load(tmp_path / "c.safetensors")


# ---- random masks


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_random_masks_match_what_they_say(share: float) -> None:
    mask = a_mask(share=share)
    sizes = {key: len(index) for key, index in mask.entries.items()}
    for seed in range(3):
        assert {k: len(v) for k, v in mask.random_like(seed).entries.items()} == sizes
        assert len(mask.random_like(seed, match="total")) == len(mask)
        for match, side in (("row", 0), ("column", 1)):
            drawn = mask.random_like(seed, match=match)  # type: ignore[arg-type]
            assert drawn != mask
            for key, index in mask.entries.items():
                before = channels(key, SHAPES[key], index)[side].sort().values
                after = channels(key, SHAPES[key], drawn.entries[key])[side].sort().values
                assert torch.equal(before, after)
    assert mask.random_like(3) == mask.random_like(3) != mask.random_like(4)
    assert mask.random_like(0, match="row") != mask.random_like(0, match="column")


@pytest.mark.parametrize("kind", ["llama", "neox"])
@pytest.mark.parametrize("match", ["pair", "magnitude", "change"])
def test_random_masks_keep_pairs_and_sizes(kind: str, match: Any) -> None:
    model = tiny.model(kind)
    weights = {key: view(model).weight(key).double() for key in view(model).keys(("Q", "K"))}
    generator = torch.Generator().manual_seed(0)
    chosen = {key: torch.rand(w.shape, generator=generator) < 0.1 for key, w in weights.items()}
    mask = SparseMask.from_bool(model, chosen)
    seen = [mask.random_like(seed, match=match, model=model) for seed in range(3)]
    assert seen[0] == mask.random_like(0, match=match, model=model) != seen[1]
    assert not any(mask == drawn for drawn in seen)
    for key, w in weights.items():
        heads, d_model, d_head = w.shape
        if match == "pair":  # of rotate-half; NeoX turns the first half of a head and leaves the rest
            turned = d_head if kind == "llama" else d_head // 2
            pair = [d % (turned // 2) if d < turned else turned for d in range(d_head)]
            classes = [
                100 * head + pair[d] for head in range(heads) for _ in range(d_model) for d in range(d_head)
            ]
        else:
            size = (w - (w.mean() if match == "change" else 0.0)).abs().flatten().tolist()
            ranked = sorted(range(len(size)), key=lambda i: -size[i])
            classes = [0] * len(size)
            for rank, i in enumerate(ranked):
                while not 2 ** (classes[i] / 2) <= 1 + rank / 32 < 2 ** ((classes[i] + 1) / 2):
                    classes[i] += 1
        expected = sorted(classes[i] for i in mask.entries[key].tolist())
        for drawn in seen:
            assert sorted(classes[i] for i in drawn.entries[key].tolist()) == expected


def test_random_masks_that_look_at_weights_refuse_what_they_cannot_look_at() -> None:
    model = tiny.model("llama")
    keys = view(model).keys(("Q", "V"))
    mask = SparseMask.from_bool(model, {key: view(model).weight(key) > 0.5 for key in keys})
    with pytest.raises(TomsparseError, match=r"pass model="):
        mask.random_like(0, match="magnitude")
    with pytest.raises(TomsparseError, match=r"matrix V of layer 0 has not \(only Q and K are rotated\)"):
        mask.random_like(0, match="pair", model=model)
    assert len(mask.random_like(0, match="change", model=model)) == len(mask)
    with pytest.raises(TomsparseError, match="The mask"):
        mask.random_like(0, match="change", model=tiny.model("neox"))
    edit = SparseEdit.zero(model, mask)
    with edit.applied(model), pytest.raises(TomsparseError, match="before the `with` block of the edit"):
        mask.random_like(0, match="change", model=model)


def test_random_masks_have_the_same_entries_everywhere_and_always() -> None:
    """Fixed numbers: another platform, numpy or torch must give these."""
    mask = SparseMask(IDENTITY, SHAPES, {(0, "Q"): torch.tensor([0, 1, 30]), (1, "O"): torch.tensor([2, 71])})
    drawn = {match: mask.random_like(7, match=match) for match in ("matrix", "total", "row", "column")}  # type: ignore[arg-type]
    found = {match: {k: v.tolist() for k, v in m.entries.items() if len(v)} for match, m in drawn.items()}
    assert found == FIXED
    wider = SparseMask(
        IDENTITY, {**SHAPES, (1, "V"): (2, 6, 3)}, {**mask.entries, (1, "V"): torch.tensor([1])}
    )
    assert wider.random_like(7).restrict(matrices=["Q", "O"]) == drawn["matrix"]


FIXED: dict[str, Any] = {
    "matrix": {(0, "Q"): [2, 51, 53], (1, "O"): [10, 33]},
    "total": {(0, "Q"): [48], (0, "out"): [49], (1, "O"): [48], (1, "in"): [39, 50]},
    "row": {(0, "Q"): [0, 20, 50], (1, "O"): [3, 71]},
    "column": {(0, "Q"): [4, 6, 18], (1, "O"): [2, 59]},
}


def test_random_masks_are_uniform() -> None:
    mask = SparseMask(IDENTITY, SHAPES, {(0, "K"): torch.tensor([0, 5, 7]), (1, "in"): torch.tensor([3])})
    hits = np.zeros((36,))
    totals = np.zeros(300)
    starts = dict(zip(SHAPES, np.cumsum([0, 72, 36, 60, 72])))
    n = 3000
    for seed in range(n):
        hits[mask.random_like(seed).entries[0, "K"].numpy()] += 1
        for key, index in mask.random_like(seed, match="total").entries.items():
            totals[starts[key] + index.numpy()] += 1
    assert hits.sum() == 3 * n
    assert totals.sum() == 4 * n
    for counts in (hits, totals):  # chi-squared, within five standard deviations
        expected = counts.sum() / len(counts)
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert abs(statistic - len(counts)) < 5 * (2 * len(counts)) ** 0.5


def test_bad_seeds_and_matches_are_refused() -> None:
    for seed in (-1, 1.5, True, "1"):
        with pytest.raises(TomsparseError, match="seed="):
            a_mask().random_like(seed)  # type: ignore[arg-type]
    with pytest.raises(TomsparseError, match="match='head'"):
        a_mask().random_like(0, match="head")  # type: ignore[arg-type]


def test_draws_are_distinct_uniform_and_complete() -> None:
    for high, n in ((1, 1), (10, 0), (10, 10), (10, 4), (10, 9), (1000, 400), (2**40, 50)):
        drawn = _draws.distinct(_draws.stream(0, 1), high, n)
        assert len(drawn) == n == len(set(drawn.tolist()))
        assert all(0 <= i < high for i in drawn)
        assert (np.diff(drawn) > 0).all()
    drawn = _draws.below(_draws.stream(5), 7, 70_000)
    assert np.abs(np.bincount(drawn, minlength=7) - 10_000).max() < 500


@pytest.mark.parametrize("matrix", MATRICES)
def test_channels_are_inputs_and_outputs_of_the_product(matrix: str) -> None:
    shape = {"O": (4, 3, 6), "gate": (6, 10), "in": (6, 10), "out": (10, 6)}.get(matrix, (4, 6, 3))
    weight = torch.arange(float(np.prod(shape))).view(shape)
    two = (
        weight
        if len(shape) == 2
        else weight.flatten(0, 1)
        if matrix == "O"
        else weight.transpose(0, 1).flatten(1)
    )
    key = (0, matrix)
    assert n_channels(key, shape) == tuple(two.shape)
    flat = torch.arange(weight.numel())
    inputs, outputs = channels(key, shape, flat)
    assert torch.equal(two[inputs, outputs], flat.float())
    assert torch.equal(flat_index(key, shape, inputs, outputs), flat)


# ---- with a model


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_boolean_tensors_and_back(kind: str) -> None:
    model = tiny.model(kind)
    seen = view(model)
    generator = torch.Generator().manual_seed(0)
    masks = {key: torch.rand(seen.shape(key), generator=generator) < 0.1 for key in seen.keys(seen.matrices)}
    mask = SparseMask.from_bool(model, masks)
    assert mask.identity == seen.identity()
    assert len(mask) == sum(int(each.sum()) for each in masks.values())
    assert all(torch.equal(mask.to_bool(key), each) for key, each in masks.items())
    with pytest.raises(TomsparseError, match="not about matrix Q of layer 9"):
        mask.to_bool((9, "Q"))
    with pytest.raises(TomsparseError, match="no matrix Q of layer 2; it has 2 layers"):
        SparseMask.from_bool(model, {(2, "Q"): masks[0, "Q"]})
    with pytest.raises(TomsparseError, match=r"must be torch\.bool \(4, 32, 8\)"):
        SparseMask.from_bool(model, {(0, "Q"): masks[0, "Q"].flatten()})
    with pytest.raises(TomsparseError, match=r"torch\.float32"):
        SparseMask.from_bool(model, {(0, "Q"): masks[0, "Q"].float()})
