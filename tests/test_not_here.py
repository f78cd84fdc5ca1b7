"""Models whose weights are quantised, not loaded, offloaded or on another machine: refused by that reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tl_tomsparse as tt
from tl_tomsparse._model import view


class Eight(nn.Module):
    """A linear layer with weights in eight bits, as quantising libraries put it in the place of one."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class EightAsLinear(Eight, nn.Linear):
    """The same, which says that it is a linear layer."""


class Four(nn.Module):
    """Two numbers of four bits in a byte, under another name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        numbers = ((linear.weight.detach() / scale).round() + 8).to(torch.uint8)
        self.register_buffer("scale", scale)
        self.register_buffer("qweight", numbers[:, ::2] * 16 + numbers[:, 1::2])

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.stack([self.qweight // 16, self.qweight % 16], 2).flatten(1).to(x.dtype) - 8
        return nn.functional.linear(x, numbers * self.scale)


def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.directory("llama"), attn_implementation="eager").eval()


def with_linear(kind: Callable[[nn.Linear], nn.Module], names: tuple[str, ...] = ()) -> Any:
    hf = plain()
    for layer in hf.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear) and name in (names or (name,)):
                    setattr(part, name, kind(child))
    return hf


def in_float8() -> Any:
    hf = plain()
    for layer in hf.model.layers:
        weight = layer.self_attn.q_proj.weight.detach()
        layer.self_attn.q_proj.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    return hf


def empty() -> Any:
    config = AutoConfig.from_pretrained(tiny.directory("llama"))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def offloaded(path: Path) -> Any:
    from accelerate import disk_offload

    hf = plain()
    disk_offload(hf, str(path), execution_device=torch.device("cpu"))
    return hf


def boot(hf: Any) -> Any:
    path = tiny.directory("llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    return TransformerBridge.boot_transformers(str(path), hf_model=hf, tokenizer=tokenizer, device="cpu")


EIGHT = r"quantised \(Q of layer 0 is a {} with weights stored as torch.int8\).* Load it in float32"
MISSING = r"not here \(device meta, .*Load it whole, without device_map or offloading"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: with_linear(Eight), EIGHT.format("Eight")),
        (lambda path: with_linear(EightAsLinear), EIGHT.format("EightAsLinear")),
        (lambda path: with_linear(Eight, ("down_proj",)), r"quantised \(out of layer 0"),
        (lambda path: with_linear(Four), r"quantised .* torch.uint8"),
        (lambda path: in_float8(), r"quantised .* torch.float8_e4m3fn"),
        (lambda path: empty(), MISSING),
        (offloaded, MISSING),
    ],
    ids=["int8", "int8 linear", "int8 in the MLP", "four bits", "float8", "no weights", "offloaded"],
)
def test_weights_that_cannot_be_read_are_refused_by_that_reason(
    make: Callable[[Path], Any], reason: str, tmp_path: Path
) -> None:
    model = boot(make(tmp_path))
    with pytest.raises(tt.TomsparseError, match=reason):
        view(model)
    assert not tt.self_check(model).ok


def test_a_model_on_another_machine_is_refused() -> None:
    """Whatever it can do, there are no weights and no gradients in this process."""
    remote = pytest.importorskip("transformer_lens.model_bridge.remote_bridge").RemoteBridge
    with pytest.raises(tt.TomsparseError, match=r"is a RemoteBridge; pass .* weights in this process"):
        view(object.__new__(remote))
