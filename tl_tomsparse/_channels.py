"""Matrices by their channels: `y = x W` with `W` as `[inputs, outputs]`, whatever its canonical shape.

Q, K, V  [heads, d_model, d_head]    inputs d_model            outputs (head, d_head)
O        [heads, d_head, d_model]    inputs (head, d_head)     outputs d_model
gate, in [d_model, d_mlp]            inputs d_model            outputs d_mlp
out      [d_mlp, d_model]            inputs d_mlp              outputs d_model
"""

from __future__ import annotations

from jaxtyping import Int64
from torch import Tensor

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import MATRICES, Key

_ORDER = {matrix: place for place, matrix in enumerate(MATRICES)}


def order(key: Key) -> tuple[int, int]:
    """Sorts keys layer by layer, then Q, K, V, O, gate, in, out."""
    layer, matrix = key
    if matrix not in _ORDER:
        raise TomsparseError(f"Matrix {matrix!r} is not one of {', '.join(MATRICES)}.")
    return layer, _ORDER[matrix]


def name(key: Key) -> str:
    """What a message calls a matrix."""
    return f"matrix {key[1]} of layer {key[0]}"


def place(shape: tuple[int, ...], flat: Int64[Tensor, " k"]) -> tuple[Tensor, ...]:
    """Entries given by their flat index, as one index tensor for each axis; much faster than
    `unravel_index`."""
    *_, rows, columns = shape
    within = (flat // columns, flat % columns)
    return within if len(shape) == 2 else (within[0] // rows, within[0] % rows, within[1])


def n_channels(key: Key, shape: tuple[int, ...]) -> tuple[int, int]:
    """The number of inputs and of outputs of a matrix with this canonical shape."""
    if len(shape) == 2:
        return shape[0], shape[1]
    heads, rows, columns = shape
    return (heads * rows, columns) if key[1] == "O" else (rows, heads * columns)


def channels(
    key: Key, shape: tuple[int, ...], flat: Int64[Tensor, " k"]
) -> tuple[Int64[Tensor, " k"], Int64[Tensor, " k"]]:
    """The input and the output channel of entries given by their flat index."""
    if len(shape) == 2 or key[1] == "O":
        return flat // shape[-1], flat % shape[-1]
    _, rows, columns = shape
    return flat // columns % rows, flat // (rows * columns) * columns + flat % columns


def flat_index(
    key: Key, shape: tuple[int, ...], inputs: Int64[Tensor, " k"], outputs: Int64[Tensor, " k"]
) -> Int64[Tensor, " k"]:
    """The inverse of [`channels`][]."""
    if len(shape) == 2 or key[1] == "O":
        return inputs * shape[-1] + outputs
    _, rows, columns = shape
    return outputs // columns * (rows * columns) + inputs * columns + outputs % columns
