"""Half-finished sensitivities on disk, and the names of matrices in files; a part of `sensitivity.py`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from tl_tomsparse._artifacts import read_safetensors, write_safetensors
from tl_tomsparse._channels import order
from tl_tomsparse._checks import TomsparseError, check_same_weights
from tl_tomsparse._model import Key, ModelIdentity
from tl_tomsparse.samples import Samples

if TYPE_CHECKING:
    from tl_tomsparse.sensitivity import FisherAccumulator

_KIND = "tomsparse.fisher_progress"
_CHECKPOINT_SECONDS = 20.0


class Progress:
    """A half-finished accumulator on disk, for one model and one set of samples in fixed batches."""

    def __init__(
        self, path: str | Path | None, fisher: FisherAccumulator, samples: Samples, batch_tokens: int
    ) -> None:
        self.path = None if path is None else Path(path)
        self.fisher = fisher
        self.saved_at = time.monotonic()
        if self.path is not None:
            self.identity = fisher._view.identity()
            self.work = _digest(samples, batch_tokens, fisher._keys, fisher._view.edited())

    def load(self) -> int:
        """Restores the sums; how many batches are in them."""
        if self.path is None or not self.path.exists():
            return 0
        tensors, header = read_safetensors(self.path, _KIND)
        found = ModelIdentity.from_dict(header["identity"])
        check_same_weights(f"The checkpoint {self.path}", found, "the model given", self.identity)
        if header["work"] != self.work:
            raise TomsparseError(
                f"The checkpoint {self.path} is of other samples, matrices, batch_tokens or edits; delete it "
                "or choose another file."
            )
        for key, value in by_layer(tensors).items():
            self.fisher._sums[key].copy_(value)
        self.fisher.n_samples = int(header["n_samples"])
        return int(header["batches"])

    def save(self, batches: int, *, last: bool) -> None:
        """Writes the sums if the last time is long enough ago, and at the end."""
        if self.path is None or not (last or time.monotonic() - self.saved_at >= _CHECKPOINT_SECONDS):
            return
        header = {
            "kind": _KIND,
            "identity": self.identity.to_dict(),
            "work": self.work,
            "n_samples": self.fisher.n_samples,
            "batches": batches,
        }
        write_safetensors(
            self.path, {file_name(key): value for key, value in self.fisher._sums.items()}, header
        )
        self.saved_at = time.monotonic()


def _digest(samples: Samples, batch_tokens: int, keys: Sequence[Key], edited: str | None) -> str:
    content = repr((samples.ids, samples.bos, batch_tokens, keys, edited))
    digest = hashlib.blake2b(content.encode(), digest_size=16)
    for tensor in (samples.tokens, samples.attention_mask, samples.supervised):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def file_name(key: Key) -> str:
    """The name of a matrix in a file."""
    return f"{key[0]}.{key[1]}"


def by_layer(tensors: Mapping[str, Tensor]) -> dict[Key, Tensor]:
    """Tensors by key, in the order of layers and of the matrices in a layer."""
    keys = {(int(layer), matrix): name for name in tensors for layer, matrix in [name.split(".")]}
    return {key: tensors[keys[key]] for key in sorted(keys, key=order)}
