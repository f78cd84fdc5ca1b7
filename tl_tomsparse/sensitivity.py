"""Sensitivity of a loss to single weights: the diagonal of the empirical Fisher.

    F[i] = (1/N) sum_n (dL_n / dW[i])^2

The empirical Fisher: labels come from the data, gradients are squared sample by sample and then averaged.
L_n is the mean cross-entropy over the supervised positions of sample n. The square of a batch's gradient is
another quantity, and no claim is made that F says what happens when a weight is changed by much.

With `y = x W` and delta = dL/dy, the gradient of row b is `x_b^T delta_b`. So one batched forward and
backward pass with hooks at x and y gives all squares exactly; the gradient of a weight is never formed for
more than one sample, and no weight requires a gradient. Squares and sums are in float32, in float64 for a
float64 model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_tomsparse._artifacts import read_safetensors, write_safetensors
from tl_tomsparse._checks import TomsparseError, check_positive, check_same_weights
from tl_tomsparse._fisher_progress import Progress, by_layer, file_name
from tl_tomsparse._model import Key, ModelIdentity, Reader, view
from tl_tomsparse.samples import Samples, check_samples

if TYPE_CHECKING:
    import pandas as pd

KIND = "tomsparse.sensitivity"
_BATCH_TOKENS = {"cpu": 800}  # larger batches fall out of a CPU's cache
_BATCH_TOKENS_ELSEWHERE = 16384


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The mean squared gradient of each weight over samples; `sensitivity[layer, matrix]` is a tensor.

    Attributes:
        values: for each (layer, matrix) a tensor in canonical orientation: Q, K, V `[heads, d_model,
            d_head]` with key-value heads not expanded, O `[heads, d_head, d_model]`, gate and in `[d_model,
            d_mlp]`, out `[d_mlp, d_model]`; squared nats per squared unit of weight.
        n_samples: N, how many samples were averaged over.
        identity: of the model.
        meta: how it was made, as JSON values; from `fisher_diagonal` "bos", "supervise", the model's "dtype",
            and "edited": None, or where edits were in the weights a fingerprint of these edited weights.
    """

    values: Mapping[Key, Float[Tensor, "*shape"]]
    n_samples: int
    identity: ModelIdentity
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: Key) -> Tensor:
        """The tensor of one matrix."""
        try:
            return self.values[key]
        except KeyError:
            known = ", ".join(f"{layer, matrix}" for layer, matrix in self.values)
            raise KeyError(f"{key} is not among the matrices of this sensitivity: {known}") from None

    def __iter__(self) -> Iterator[Key]:
        """The keys, layer by layer."""
        return iter(self.values)

    def __len__(self) -> int:
        """The number of matrices."""
        return len(self.values)

    def __repr__(self) -> str:
        """One line: of what, over what."""
        matrices = ", ".join(dict.fromkeys(matrix for _, matrix in self.values))
        layers = len({layer for layer, _ in self.values})
        return (
            f"Sensitivity({self.identity.name!r}, {matrices} of {layers} layers, "
            f"{sum(map(Tensor.numel, self.values.values())):,} weights, {self.n_samples} samples)"
        )

    def keys(self) -> Collection[Key]:
        """(layer, matrix) pairs, layer by layer."""
        return self.values.keys()

    def items(self) -> Collection[tuple[Key, Tensor]]:
        """Pairs of key and tensor, layer by layer."""
        return self.values.items()

    def merge(self, other: Sensitivity) -> Sensitivity:
        """The sensitivity over the samples of both: the means weighted by their numbers of samples.

        Raises:
            TomsparseError: other weights, other matrices, or samples made in another way (`meta`).
        """
        check_same_weights("This sensitivity", self.identity, "the other", other.identity)
        if self.values.keys() != other.values.keys():
            raise TomsparseError(
                "The two sensitivities are of different matrices; compute both for the same."
            )
        if dict(self.meta) != dict(other.meta):
            raise TomsparseError(
                f"The samples were made differently ({dict(self.meta)} and {dict(other.meta)}); their mean "
                "would be of neither."
            )
        n = self.n_samples + other.n_samples
        values = {
            key: value.mul(self.n_samples / n).add_(
                other.values[key].to(value.device), alpha=other.n_samples / n
            )
            for key, value in self.values.items()
        }
        return Sensitivity(values, n, self.identity, self.meta)

    def to_frame(self) -> pd.DataFrame:
        """One row a matrix and head (-1 in an MLP): n_weights, and the sum, mean and max of the values."""
        import pandas as pd

        rows = []
        for (layer, matrix), value in self.values.items():
            heads = value.flatten(1) if value.ndim == 3 else value.flatten()[None]
            sums, tops = heads.double().sum(1).tolist(), heads.amax(1).tolist()
            size = heads.shape[1]
            for head, (total, top) in enumerate(zip(sums, tops)):
                place = head if value.ndim == 3 else -1
                rows.append((layer, matrix, place, size, total, total / size, top))
        return pd.DataFrame(rows, columns=["layer", "matrix", "head", "n_weights", "sum", "mean", "max"])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        header = {
            "kind": KIND,
            "n_samples": self.n_samples,
            "identity": self.identity.to_dict(),
            "meta": dict(self.meta),
        }
        write_safetensors(path, {file_name(key): value for key, value in self.values.items()}, header)

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `save` wrote; tensors are on the CPU."""
        tensors, header = read_safetensors(path, KIND)
        identity = ModelIdentity.from_dict(header["identity"])
        return cls(by_layer(tensors), int(header["n_samples"]), identity, header["meta"])


class FisherAccumulator:
    """Sums squared per-sample gradients of your own loss while it is active.

        with FisherAccumulator(model, matrices=("Q", "K")) as fisher:
            for tokens, attention in batches:
                per_sample_loss(model(tokens, attention_mask=attention)).sum().backward()
        sensitivity = fisher.result()

    Each row of a forward pass is one sample. The loss must be a *sum* over rows of losses that depend on
    one row each: a mean over the batch would divide the squares by the batch size squared. Every forward
    pass gets at most one backward pass. Weights are frozen meanwhile (their `.grad` is not touched) and a
    graph starts by itself at the first matrix asked for, so it also works when all weights were frozen
    before.

    Args:
        model: `TransformerBridge` or `HookedTransformer`, in evaluation mode.
        matrices: any of "Q", "K", "V", "O", "gate", "in", "out" that the model has.
        allow_processed: accept folded or centred weights; the result belongs to that basis.

    Attributes:
        n_samples: rows whose gradients were added.
        row_names: names of the rows of the next forward pass, for messages; row numbers if None.

    Raises:
        TomsparseError: training mode, processed weights, a matrix that the model does not have; from
            `backward`, a gradient that is not a finite number, with layer, matrix and row.
    """

    def __init__(
        self, model: Any, *, matrices: Collection[str] = ("Q", "K"), allow_processed: bool = False
    ) -> None:
        self._view = view(model)
        self._view.require_raw_basis(allow_processed=allow_processed)
        self._keys = self._view.keys(matrices)
        self._exact = torch.float64 if self._view.dtype == torch.float64 else torch.float32
        self._sums: dict[Key, Tensor] = {}
        for key in self._keys:
            weight = self._view.weight(key)
            n_in = weight.shape[0] * weight.shape[1] if key[1] == "O" else weight.shape[-2]
            size = (n_in, weight.numel() // n_in)
            self._sums[key] = torch.zeros(size, dtype=self._exact, device=weight.device)
        self._buffers: dict[tuple[torch.Size, torch.device], Tensor] = {}
        self._inputs: dict[Key, Tensor] = {}
        self._pass = _Pass(None)
        self._active: ExitStack | None = None
        self.n_samples = 0
        self.row_names: Sequence[str] | None = None

    def __enter__(self) -> FisherAccumulator:
        """Freezes the weights and installs the hooks."""
        if self._active is not None:
            raise TomsparseError("This FisherAccumulator is active already.")
        self._view.require_eval()
        hooks = self._view.input_hooks(self._keys, self._keep_input)
        hooks += [(self._view.output_hook(key), partial(self._watch, key=key)) for key in self._keys]
        with ExitStack() as stack:
            stack.callback(self._inputs.clear)
            stack.callback(self._buffers.clear)
            model = self._view.model
            for parameter in chain(model.parameters(), nn.Module.parameters(model)):
                if parameter.requires_grad:
                    stack.callback(parameter.requires_grad_, True)
                    parameter.requires_grad_(False)
            stack.enter_context(self._view.hooks(hooks))
            self._active = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the model as it was."""
        if self._active is not None:
            self._active.close()
            self._active = None

    def result(self, meta: Mapping[str, Any] | None = None) -> Sensitivity:
        """The mean over the samples so far.

        Raises:
            TomsparseError: no gradient has arrived, or a sum is not a finite number.
        """
        if not self.n_samples:
            raise TomsparseError(
                "No gradient has arrived: call backward on a loss of this model's output inside the block, "
                "with gradients enabled."
            )
        values: dict[Key, Tensor] = {}
        for key, total in self._sums.items():
            mean = total / self.n_samples
            if not bool(torch.isfinite(mean).all()):
                raise TomsparseError(
                    f"The squared gradients of {key[1]} in layer {key[0]} overflow {self._exact}."
                )
            heads = self._view.shape(key)[0]
            if key[1] == "O":
                mean = mean.unflatten(0, (heads, -1))
            elif key[1] in "QKV":
                mean = mean.unflatten(1, (heads, -1)).transpose(0, 1).contiguous()
            values[key] = mean
        return Sensitivity(values, self.n_samples, self._view.identity(), dict(meta or {}))

    def _keep_input(self, group: tuple[Key, ...], x: Tensor) -> None:
        x = x.detach().flatten(2).to(self._exact)
        for key in group:
            self._inputs[key] = x

    def _watch(self, y: Tensor, hook: Any, *, key: Key) -> Tensor | None:
        del hook
        if not torch.is_grad_enabled():
            return None
        if not self._pass.seen or key in self._pass.seen:  # a forward pass begins
            self._pass = _Pass(self.row_names)
        self._pass.seen.add(key)
        if not y.requires_grad:
            # The graph starts here; the copy, because a leaf must not be changed in place by other hooks.
            y = y.detach().requires_grad_().clone()
        y.register_hook(partial(self._add, key=key, x=self._inputs[key], forward=self._pass))
        return y  # returned, because on the bridge y is a reshaped view that is outside the graph otherwise

    def _add(self, grad: Tensor, *, key: Key, x: Tensor, forward: _Pass) -> None:
        if key in forward.added:
            raise TomsparseError(
                "A second backward pass through one forward pass; add the losses up instead."
            )
        if not forward.added:
            self.n_samples += len(x)
        forward.added.add(key)
        delta = grad.flatten(2)
        size = torch.linalg.vector_norm(delta, dim=-1, dtype=self._exact)
        rows: list[int] = (size != 0).sum(1).tolist()
        if not bool(torch.isfinite(size).all()):
            row = int((~torch.isfinite(size)).any(1).long().argmax())
            name = row if forward.row_names is None else repr(forward.row_names[row])
            raise TomsparseError(
                f"The gradient of {key[1]} in layer {key[0]} is not finite for sample {name}; look at its "
                "text, or load the model in float32."
            )
        # Positions without gradient (padding; in the last layer all that nothing looks at) add nothing.
        total = self._sums[key]
        single = [b for b, count in enumerate(rows) if count == 1]
        if single:  # x_b^T delta_b of rank one: its square is the product of the squares
            where = size[single].ne(0).long().argmax(1)
            index = torch.tensor(single, device=delta.device)
            x_one, delta_one = x[index, where], delta[index, where].to(self._exact)
            total.addmm_(x_one.square_().T, delta_one.square())
        several = [b for b, count in enumerate(rows) if count > 1]
        if several:
            buffer = self._buffers.get((total.shape, total.device))
            if buffer is None:
                buffer = self._buffers[total.shape, total.device] = torch.empty_like(total)
            for b in several:
                delta_b, x_b = delta[b], x[b]
                if rows[b] < len(delta_b):
                    used = size[b].nonzero().flatten()
                    first, last = int(used[0]), int(used[-1]) + 1
                    delta_b, x_b = delta_b[first:last], x_b[first:last]
                torch.mm(x_b.T, delta_b.to(self._exact), out=buffer)
                total.addcmul_(buffer, buffer)


class _Pass:
    """One forward pass: which outputs were seen, and which gradients were added."""

    def __init__(self, row_names: Sequence[str] | None) -> None:
        self.seen: set[Key] = set()
        self.added: set[Key] = set()
        self.row_names = row_names


@torch.inference_mode(False)  # in which a caller may be, and where there are no gradients
def fisher_diagonal(
    model: Any,
    samples: Samples,
    *,
    matrices: Collection[str] = ("Q", "K"),
    batch_tokens: int | None = None,
    show_progress: bool = True,
    checkpoint: str | Path | None = None,
    allow_processed: bool = False,
) -> Sensitivity:
    """The diagonal of the empirical Fisher, exact, a mean over samples.

    Args:
        model: `TransformerBridge` or `HookedTransformer`, in evaluation mode.
        samples: each with its own loss, the mean cross-entropy over its supervised positions, in nats.
        matrices: any of "Q", "K", "V", "O", "gate", "in", "out" that the model has.
        batch_tokens: most tokens in one batch, padding included; by default chosen for the device. It
            changes the speed and, by rounding, the last digits.
        show_progress: a progress bar over samples.
        checkpoint: a file to which progress is written every few seconds. If it exists, work goes on from
            there and the result is the same to the last bit as without interruption.
        allow_processed: accept folded or centred weights; the result belongs to that basis.

    Raises:
        TomsparseError: what [`FisherAccumulator`][] refuses; samples longer than the model's context; a
            checkpoint of another model, other samples or other settings.
    """
    model_view = view(model)
    check_samples(model_view, samples)
    budget = batch_tokens or _BATCH_TOKENS.get(model_view.device.type, _BATCH_TOKENS_ELSEWHERE)
    check_positive("batch_tokens", budget)
    fisher = FisherAccumulator(model, matrices=matrices, allow_processed=allow_processed)
    batches = list(samples.batches(budget))
    read = Reader(model_view)
    progress = Progress(checkpoint, fisher, samples, budget)
    done = progress.load()
    with (
        torch.enable_grad(),
        model_view.hooks(read.before),
        fisher,
        model_view.hooks(read.after),
        tqdm(total=len(samples), desc="Fisher", disable=not show_progress) as bar,
    ):
        bar.update(fisher.n_samples)
        for index, rows in enumerate(batches[done:], start=done + 1):
            batch = samples[rows]
            fisher.row_names = batch.ids
            row_losses(read, batch).sum().backward()
            bar.update(len(batch))
            progress.save(index, last=index == len(batches))
    meta: dict[str, Any] = {"bos": samples.bos, "supervise": samples.supervise}
    meta |= {"dtype": str(model_view.dtype), "edited": model_view.edited()}
    return fisher.result(meta)


def row_losses(read: Reader, batch: Samples) -> Float[Tensor, " batch"]:
    """For each row the mean negative log-probability, in nats, of its supervised tokens."""
    # Position p is predicted from p - 1, so nothing is read from the last one.
    where = batch.supervised[:, 1:]
    logits = read(batch.tokens[:, :-1], batch.attention_mask[:, :-1], where)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = batch.tokens[:, 1:][where].to(logits.device)
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    row = where.nonzero()[:, 0].to(logits.device)
    return losses.new_zeros(len(where)).index_add(0, row, losses) / where.sum(1).to(logits)
