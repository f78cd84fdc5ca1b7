"""What a model's weights are, in a few bytes: the part of `_model.py` that tells weights apart.

    fingerprint = hash over tensors of (name, shape, dtype, sum_i (1 + i) bits[i] along each axis, a sample)

Bit patterns are summed as integers, which gives the same numbers in any order and on every device; they move
with every changed bit and with every two exchanged entries. The sample is up to 4096 entries at equal
distances. Not claimed: safety against weights made to collide on purpose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Basis = Literal["raw", "processed"]
_SAMPLE = 4096


@dataclass(frozen=True)
class ModelIdentity:
    """What a sensitivity, mask or edit was made from.

    Attributes:
        name: the model's name without organisation or directory; says nothing about the weights.
        fingerprint: of the seven kinds of matrices, the embedding and the unembedding; the same on every
            device, and the same for `HookedTransformer` without weight processing and the bridge.
        basis: "raw" weights, or "processed" (folded norms, centred weights), where Q and K are different
            matrices.
        transformer_lens: the installed version; recorded, not compared.
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp: sizes; n_heads counts query heads.
    """

    name: str
    fingerprint: str
    basis: Basis
    transformer_lens: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int

    def to_dict(self) -> dict[str, Any]:
        """The attributes as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelIdentity:
        """The inverse of `to_dict`."""
        return cls(**values)

    def same_weights(self, other: ModelIdentity) -> bool:
        """Whether both mean the same weights in the same basis."""
        return (self.fingerprint, self.basis) == (other.fingerprint, other.basis)


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory read as integers, so that equal means equal in every bit."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of tensors with their names; 32 hexadecimal digits, equal on every device."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in named:
        bits = as_bits(tensor)
        sums = [_weighted_sum(bits, axis) for axis in range(bits.ndim)]
        count = min(_SAMPLE, tensor.numel())
        flat = torch.arange(count, device=bits.device) * (tensor.numel() - 1) // max(count - 1, 1)
        sample = bits[torch.unravel_index(flat, bits.shape)].long().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{sums}".encode() + sample.tobytes())
    return digest.hexdigest()


def _weighted_sum(bits: Tensor, axis: int) -> int:
    """Sum of entries, each times its index along one axis plus 1, modulo 2^64."""
    others = [other for other in range(bits.ndim) if other != axis]
    along = bits.sum(others, dtype=torch.int64) if others else bits.long()
    return int((along * torch.arange(1, len(along) + 1, device=along.device)).sum().item())
