"""Stories and texts as batches of tokens, made once and scored as often as a sweep needs.

    option score   s(o) = sum_i log P(o_i | prompt, o_1..o_{i-1})
    sample loss    NLL_n = - sum_{supervised p} log P(token_p | tokens before p)

The row of an option is the prompt and all of its tokens but the last, since only these are read from. So
options of one token share the prompt's row, equal rows are computed once, and a row that begins another row
is read from the longer one (attention is causal, rows are padded on the right). Batches hold rows of similar
length under a budget of tokens.

*Packed*, rows with a common beginning are one tree of tokens: the story once, then its questions, each of
which sees the story and itself (attention mask) at the positions that it would have alone. That is four times
less work for seven questions a story. Models that do not obey such masks are found out by comparing the
largest tree with plain rows, and get plain rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from tl_tomsparse._checks import check_positive
from tl_tomsparse._model import ModelView, Reader, view

Wanted = tuple[Sequence[int], Sequence[tuple[int, int]]]
_TOLERANCE = 1e-3  # nats by which packed and plain sums may differ: rounding, far below any effect


@dataclass
class _Tree:
    """Rows of tokens that share beginnings; without branches, one row."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    reads: list[tuple[int, int, int]] = field(default_factory=list)  # (node, token that follows, total)

    def grow(self, parent: int, tokens: Sequence[int]) -> list[int]:
        """Appends a branch after the node `parent` (-1: at the root), and gives its nodes."""
        first = len(self.tokens)
        start = self.positions[parent] + 1 if parent >= 0 else 0
        self.tokens += tokens
        self.positions += range(start, start + len(tokens))
        self.parents += [parent, *range(first, first + len(tokens) - 1)][: len(tokens)]
        return list(range(first, len(self.tokens)))

    @property
    def branched(self) -> bool:
        return self.parents != list(range(-1, len(self.parents) - 1))

    def attention(self) -> NDArray[np.bool_]:
        """`[node, node]`, True where the second is the first or one of its ancestors."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


@dataclass(frozen=True, eq=False)
class Batch:
    """Trees padded on the right; `where` are the nodes read from, `slot` counts these tree by tree."""

    tokens: Int[Tensor, "batch pos"]
    attention: Bool[Tensor, "batch pos"] | Bool[Tensor, "batch query key"]
    positions: Int[Tensor, "batch pos"]
    where: Bool[Tensor, "batch pos"]
    slot: Int[Tensor, " reads"]
    token: Int[Tensor, " reads"]
    total: Int[Tensor, " reads"]

    def logits(self, read: Reader) -> Float[Tensor, "read_from d_vocab"]:
        """Logits at the nodes read from."""
        positions = self.positions if self.attention.ndim == 3 else None
        logits = read(self.tokens, self.attention, self.where, positions)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def add_to(self, totals: Float[Tensor, " totals"], read: Reader) -> None:
        """Adds the log-probabilities that are read to the totals that they belong to."""
        logits = self.logits(read)
        log_probs = logits[self.slot, self.token] - logits.logsumexp(-1)[self.slot]
        totals.index_add_(0, self.total, log_probs.to(totals))

    def repeated(self, times: int, n_totals: int) -> Batch:
        """The same trees several times, all of them in turn, each time with totals of its own."""

        def again(values: Tensor) -> Tensor:
            return values.repeat(times, *[1] * (values.ndim - 1))

        def counted(values: Tensor, step: int) -> Tensor:
            starts = step * torch.arange(times, device=values.device)
            return (starts[:, None] + values).flatten()

        return Batch(
            tokens=again(self.tokens),
            attention=again(self.attention),
            positions=again(self.positions),
            where=again(self.where),
            slot=counted(self.slot, int(self.where.sum())),
            token=again(self.token),
            total=counted(self.total, n_totals),
        )


@dataclass(frozen=True, eq=False)
class Reads:
    """Rows of tokens with the log-probabilities to read from them, summed into totals.

    Attributes:
        batches: trees of similar length.
        n_totals: how many sums there are.
        n_tokens: tokens of all trees, without padding: the cost of one pass.
        digest: of what is summed, on any device, packed or not: with equal weights, equal sums.
    """

    batches: tuple[Batch, ...] = field(repr=False)
    n_totals: int
    n_tokens: int
    digest: str

    def totals(self, model: Any, *, description: str, show_progress: bool) -> Float[np.ndarray, " totals"]:
        """Each sum of log-probabilities in nats, float64."""
        model_view = view(model)
        model_view.require_eval()
        totals = torch.zeros(self.n_totals, dtype=torch.float64, device=model_view.device)
        with torch.inference_mode(), model_view.reader() as read:
            for batch in tqdm(self.batches, desc=description, disable=not show_progress, leave=False):
                batch.add_to(totals, read)
        return totals.cpu().numpy()


def collect_reads(model: Any, wanted: Sequence[Wanted], *, pack: bool, batch_tokens: int | None) -> Reads:
    """Batches for sums of log-probabilities.

    Args:
        model: decides the device, the padding, and whether rows can be packed.
        wanted: for each sum, the tokens of a row and the (position, token) pairs: the log-probability of
            `token` as the successor of `position` is added.
        pack: compute common beginnings once, if the model obeys. Hooks of the caller would see packed rows.
        batch_tokens: most tokens a batch, padding included (a longer tree is a batch of its own); None for
            the default of the device.

    Raises:
        TomsparseError: the model turns some of these rows by other frequencies than the rest.
    """
    model_view = view(model)
    model_view.require_eval()
    model_view.require_same_rotation({len(row) for row, _ in wanted})
    budget = default_batch_tokens(model_view) if batch_tokens is None else batch_tokens
    check_positive("batch_tokens", budget)
    trees = _trees(wanted, model_view.n_ctx if pack else 0)
    branched = [tree for tree in trees if tree.branched]
    if branched:
        largest = max(branched, key=lambda tree: len(tree.tokens))
        if not _obeys(model_view, [wanted[total] for total in sorted({read[2] for read in largest.reads})]):
            trees = _trees(wanted, 0)
    content = repr([(list(row), list(places)) for row, places in wanted])
    digest = hashlib.blake2b(content.encode(), digest_size=16)
    return Reads(
        _batches(model_view, trees, budget),
        len(wanted),
        sum(len(t.tokens) for t in trees),
        digest.hexdigest(),
    )


def _trees(wanted: Sequence[Wanted], longest: int) -> list[_Tree]:
    """The trees of all rows; branches only where half of a row is shared, in trees up to `longest` tokens."""
    trees: list[_Tree] = []
    home: dict[tuple[int, ...], tuple[_Tree, list[int]]] = {}
    last: tuple[int, ...] = ()
    # In sorted order the beginning that a row shares with any row before it, it shares with the last one.
    for row in sorted({tuple(row) for row, _ in wanted}):
        shared = next((i for i, (a, b) in enumerate(zip(last, row)) if a != b), min(len(last), len(row)))
        tree, path = home.get(last, (_Tree(), []))
        fits = 2 * shared >= len(row) and len(tree.tokens) + len(row) - shared <= longest
        extends = shared == len(last) and not tree.branched
        if not trees or not (extends or fits):
            tree, path, shared = _Tree(), [], 0
            trees.append(tree)
        parent = path[shared - 1] if shared else -1
        home[row] = tree, path[:shared] + tree.grow(parent, row[shared:])
        last = row
    for total, (tokens, places) in enumerate(wanted):
        tree, path = home[tuple(tokens)]
        tree.reads += [(path[position], token, total) for position, token in places]
    return trees


def _batches(model_view: ModelView, trees: list[_Tree], budget: int) -> tuple[Batch, ...]:
    groups: list[list[_Tree]] = []
    for tree in sorted(trees, key=lambda tree: (tree.branched, len(tree.tokens))):
        fits = groups and len(tree.tokens) * (len(groups[-1]) + 1) <= budget
        if not fits or tree.branched != groups[-1][0].branched:
            groups.append([])
        groups[-1].append(tree)
    return tuple(_batch(model_view, group) for group in groups)


def _batch(model_view: ModelView, group: list[_Tree]) -> Batch:
    shape = (len(group), max(len(tree.tokens) for tree in group))
    tokens = torch.full(shape, model_view.pad_token_id, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    real = torch.zeros(shape, dtype=torch.bool)
    # Padding sees itself, so that no softmax is empty.
    seen = torch.eye(shape[1], dtype=torch.bool).repeat(len(group), 1, 1)
    reads: list[tuple[int, int, int, int]] = []
    for place, tree in enumerate(group):
        n = len(tree.tokens)
        tokens[place, :n], positions[place, :n] = torch.tensor(tree.tokens), torch.tensor(tree.positions)
        real[place, :n] = True
        if tree.branched:
            seen[place, :n, :n] = torch.from_numpy(tree.attention())
        reads += [(place, *read) for read in tree.reads]
    place_of, node_of, token_of, total_of = (
        torch.tensor(reads, dtype=torch.long).reshape(-1, 4).T.contiguous()
    )
    where = torch.zeros_like(real)
    where[place_of, node_of] = True
    slot = (where.flatten().cumsum(0) - 1).view_as(tokens)[place_of, node_of]
    attention = seen if group[0].branched else real
    tensors = (tokens, attention, positions, where, slot, token_of, total_of)
    return Batch(*(tensor.to(model_view.device) for tensor in tensors))


def _obeys(model_view: ModelView, wanted: Sequence[Wanted]) -> bool:
    """Whether packed rows give the numbers of plain rows; in half precision that could not be told."""
    if model_view.dtype not in (torch.float32, torch.float64):
        return False
    sums = []
    for longest in (0, model_view.n_ctx):
        batches = _batches(model_view, _trees(wanted, longest), default_batch_tokens(model_view))
        reads = Reads(batches, len(wanted), 0, "")
        try:
            sums.append(reads.totals(model_view.model, description="", show_progress=False))
        except Exception:  # whatever a model raises that knows no such mask
            return False
    return bool(np.abs(sums[0] - sums[1]).max() <= _TOLERANCE)


def default_batch_tokens(model_view: ModelView) -> int:
    """Most tokens in one batch on the model's device."""
    """On a CPU larger batches fall out of its cache; on a GPU logits bound them."""
    if model_view.device.type == "cpu":
        return 1024
    return max(1024, min(32768, 2**29 // model_view.d_vocab))
