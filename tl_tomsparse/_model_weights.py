"""Where a model's matrices lie in memory and how they are oriented; a part of `_model.py`.

    y = x W + b    Q, K, V [heads, d_model, d_head]   O [heads, d_head, d_model]
                   gate, in [d_model, d_mlp]          out [d_mlp, d_model]

Parameters are resolved through their owner, never remembered themselves: processing the weights puts new
objects in their places.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.pytorch_utils import Conv1D

from tl_tomsparse._checks import TomsparseError

MatrixName = Literal["Q", "K", "V", "O", "gate", "in", "out"]
MATRICES: tuple[MatrixName, ...] = ("Q", "K", "V", "O", "gate", "in", "out")
IN_ATTENTION = ("Q", "K", "V", "O")
Key = tuple[int, str]


class Weights:
    """The live matrices of one model.

    Attributes:
        readable: keys of the matrices that exist as plain linear layers, layer by layer.
        reasons: for the others by name, why not.
    """

    def __init__(self, model: Any, name: str) -> None:
        self._model, self._name = model, name
        self._d_head = int(model.cfg.d_head)
        self._owners: dict[Key, tuple[nn.Module, str, bool]] = {}
        self.reasons: dict[str, str] = {}
        if not hasattr(model, "blocks"):
            raise TomsparseError(
                f"{name} has no single stack of layers (TransformerLens gives it no `blocks`), so its "
                "matrices cannot be named by layer."
            )
        self._check_loaded()
        every = [(layer, matrix) for layer in range(int(model.cfg.n_layers)) for matrix in MATRICES]
        self._uneven: dict[str, str] = {}
        there = [key for key in every if self._is_readable(key)]
        # In every layer or in none: a mask of some layers would pass for one of the whole model.
        self.readable: list[Key] = [key for key in there if key[1] not in self._uneven]
        self.reasons |= self._uneven
        readable = {matrix for _, matrix in self.readable}
        if not readable & set(IN_ATTENTION):
            why = "; ".join(dict.fromkeys(self.reasons.values()))
            raise TomsparseError(f"{name} has no attention matrices that can be addressed: {why}.")
        if not readable & {"Q", "K"}:
            raise TomsparseError(
                f"{name} has no Q and K matrices of its own: its attention makes queries and keys by several "
                "matrices (as multi-head latent attention, MLA, does), none of which is one linear map from "
                "the residual stream."
            )

    def parameter(self, key: Key) -> Tensor:
        """The parameter that holds a matrix, as the model has it."""
        module, attribute, _ = self._owner(key)
        return cast(Tensor, getattr(module, attribute))

    def __getitem__(self, key: Key) -> Tensor:
        """The live matrix in canonical orientation, a detached view."""
        return self.oriented(key, self.parameter(key).detach())

    def oriented(self, key: Key, weight: Tensor) -> Tensor:
        """A tensor shaped like the parameter, or like its gradient, in canonical orientation: a view."""
        if weight.ndim == 3:  # HookedTransformer's attention is canonical already
            return weight
        weight = weight if self._owner(key)[2] else weight.T
        if key[1] == "O":
            return weight.unflatten(0, (-1, self._d_head))
        return weight.unflatten(1, (-1, self._d_head)).transpose(0, 1) if key[1] in "QKV" else weight

    def first_now(self) -> int:
        """Which object holds the first matrix now, looked for anew: another one after weight processing."""
        module, attribute, _ = self._find_owner(*self.readable[0])
        return id(getattr(module, attribute))

    def _owner(self, key: Key) -> tuple[nn.Module, str, bool]:
        """The module and attribute of a matrix's parameter, and whether its first axis is the input."""
        if key not in self._owners:  # looked for once, because edits ask for many
            self._owners[key] = self._find_owner(*key)
        return self._owners[key]

    def _find_owner(self, layer: int, matrix: str) -> tuple[nn.Module, str, bool]:
        part = "attn" if matrix in IN_ATTENTION else "mlp"
        block = self._model.blocks[layer]
        if part not in block._modules:
            what = "attention" if part == "attn" else "MLP"
            raise LookupError(f"TransformerLens shows no {what} in some of its layers")
        owner = block._modules[part]
        if isinstance(self._model, TransformerBridge):
            linear = owner._modules.get(matrix.lower())
            component = getattr(linear, "original_component", None)
            if component is None:
                raise LookupError(f"its {part} has no {matrix} matrix of its own")
            self._check_stored(layer, matrix, component)
            if not isinstance(component, nn.Linear | Conv1D):
                raise LookupError(f"{matrix} is a {type(component).__name__}, not a plain linear layer")
            return component, "weight", isinstance(component, Conv1D)
        # With grouped-query attention W_K and W_V are expanded copies; the parameters have an underscore.
        for attribute in (f"_W_{matrix}", f"W_{matrix}"):
            weight = owner._parameters.get(attribute)
            if weight is not None:
                self._check_stored(layer, matrix, owner, weight)
                return owner, attribute, True
        raise LookupError(f"its {part} has no {matrix} matrix of its own")

    def _is_readable(self, key: Key) -> bool:
        try:
            weight = self.parameter(key)
        except LookupError as error:
            self.reasons[key[1]] = str(error)
            return False
        if key[1] in IN_ATTENTION and weight.ndim == 2:
            n = weight.shape[self._owner(key)[2] == (key[1] != "O")]
            if n % self._d_head:
                self._uneven[key[1]] = (
                    f"in layer {key[0]} the heads of {key[1]} have {n} dimensions together, no multiple of "
                    f"{self._d_head}"
                )
        if weight.is_inference():
            raise TomsparseError(
                f"{self._name} was loaded in torch.inference_mode(), where PyTorch does not count writes to "
                "weights; load it outside, and use inference_mode around your own computations."
            )
        return True

    def _check_stored(self, layer: int, matrix: str, module: nn.Module, weight: Any = None) -> None:
        """Refuse weights in a few bits, whatever module holds them and under whatever name; integers beside
        whole weights are something else (the table of a router).
        """
        weight = getattr(module, "weight", None) if weight is None else weight
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() >= 2:
            return
        for tensor in (weight,) if isinstance(weight, Tensor) else (*module.parameters(), *module.buffers()):
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise TomsparseError(
                    f"{self._name} is quantised ({matrix} of layer {layer} is a {type(module).__name__} with "
                    f"weights stored as {tensor.dtype}); its weights cannot be read or edited one by one. "
                    "Load it in float32, bfloat16 or float16."
                )

    def _check_loaded(self) -> None:
        """Refuse weights that are elsewhere: made without values, or offloaded and fetched when needed."""
        for name, parameter in nn.Module.named_parameters(self._model):
            if parameter.device.type == "meta":
                raise TomsparseError(
                    f"{self._name} has weights that are not here (device meta, {name}): it was made without "
                    "them, or they are offloaded. Load it whole, without device_map or offloading."
                )
