"""Loading: directories and names, both backends, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families
import oracles
import pytest
import tiny
import torch

from tl_tomsparse import models
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import HookedTransformer, ModelView, view
from tl_tomsparse.models import load_model
from tl_tomsparse.samples import text_samples
from tl_tomsparse.sensitivity import fisher_diagonal

DATA = Path(__file__).parents[2] / "shared" / "data"
REAL = DATA / "models" / "stories260k"
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/models/stories260k")
needs_hooked = pytest.mark.skipif(
    HookedTransformer is None, reason="TransformerLens 4 has no HookedTransformer"
)
every_backend = pytest.mark.parametrize("backend", tiny.BACKENDS)
TOKENS = torch.tensor([[1, 40, 300, 77, 5, 9, 81]])


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A model directory to break."""
    return Path(shutil.copytree(tiny.directory("llama"), tmp_path / "model"))


@pytest.mark.parametrize("kind", tiny.KINDS)
@every_backend
def test_logits_are_those_of_the_original(kind: str, backend: str) -> None:
    model = tiny.model(kind, backend)
    found = model(TOKENS, return_type="logits")[0]
    expected = oracles.logits(tiny.hf_model(kind, dtype=torch.float32), TOKENS[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not model.training
    assert model.tokenizer.decode(TOKENS[0, :1]) == "<bos>"


@pytest.mark.parametrize("kind", tiny.KINDS)
@every_backend
def test_the_tokenizer_is_the_one_that_was_saved(kind: str, backend: str) -> None:
    saved, found = tiny.build_tokenizer(), tiny.model(kind, backend).tokenizer
    assert found.get_vocab() == saved.get_vocab()
    for text in (*tiny.CORPUS, "SallyAnna  12 can't\n"):
        ids = saved(text, add_special_tokens=False)["input_ids"]
        assert found(text, add_special_tokens=False)["input_ids"] == ids


@every_backend
def test_dtype_and_name(backend: str) -> None:
    model = tiny.model("llama", backend, dtype=torch.bfloat16)
    assert view(model).dtype == torch.bfloat16
    assert view(model).name == tiny.directory("llama").name
    assert view(model).identity().name == view(model).name


@needs_data
@every_backend
def test_a_real_model_loads_and_predicts_text(backend: str) -> None:
    model = load_model(REAL, backend=backend, device="cpu")  # type: ignore[arg-type]
    model_view = view(model)
    assert (model_view.n_layers, model_view.n_heads, model_view.n_kv_heads) == (5, 8, 4)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    tokens = torch.tensor([[1, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]])
    nll = model(tokens, return_type="loss").item()
    assert nll < 1.5  # 6.2 nats would be guessing


@needs_data
def test_fisher_of_a_real_model_is_the_same_on_every_backend() -> None:
    text = (DATA / "text" / "tinyshakespeare.txt").read_text()[:5000]
    found = []
    for backend in tiny.BACKENDS:
        model = load_model(REAL, backend=backend, device="cpu")
        samples = text_samples(model, text, n=3, length=64)
        found.append(fisher_diagonal(model, samples, matrices=("Q", "K", "out"), show_progress=False))
    hf = models._load_hf(str(REAL), torch.float64)[0]
    expected = oracles.fisher(hf, samples)
    for sensitivity in found:
        for key, value in sensitivity.items():
            assert (value - expected[key]).abs().max() < 1e-5 * expected[key].max(), key


def test_embedded_model_loads_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "EMBEDDED", tiny.directory("llama"))
    model = load_model(device="cpu")
    assert view(model).name == models.EMBEDDED_NAME
    assert view(model).dtype == torch.float32
    monkeypatch.setattr(models, "EMBEDDED", tmp_path)
    with pytest.raises(TomsparseError, match="no embedded model"):
        load_model()


def test_what_cannot_be_run_in_float64_names_the_cure() -> None:
    """The mask of XGLM; and products of all experts at once, where they were asked for by hand."""
    with pytest.raises(
        TomsparseError, match=r"cannot be run in torch.float64 .* load it with dtype=torch.float32"
    ):
        load_model(families.directory("XGLM"), device="cpu", dtype=torch.float64)
    model = load_model(families.directory("Mixtral"), device="cpu", dtype=torch.float64)
    model.original_model.set_experts_implementation("grouped_mm")
    with pytest.raises(
        TomsparseError, match=r"cannot be run in torch.float64 .* in float32, or with load_model"
    ):
        ModelView(model)


@pytest.mark.skipif(HookedTransformer is not None, reason="TransformerLens 3 has HookedTransformer")
def test_hooked_is_refused_where_it_does_not_exist() -> None:
    with pytest.raises(TomsparseError, match=r'backend="bridge".*transformer-lens>=3\.9,<4'):
        load_model(tiny.directory("llama"), backend="hooked")


@needs_hooked
def test_a_conversion_that_changes_logits_is_refused(broken: Path) -> None:
    # TransformerLens ignores linear rope scaling without a word.
    path = broken / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
    path.write_text(json.dumps(config))
    with pytest.raises(TomsparseError, match=r'other logits.*backend="bridge"'):
        load_model(broken, backend="hooked")
    assert view(load_model(broken)).n_layers == 2


@needs_hooked
def test_converted_model_shares_nothing_with_the_original(broken: Path) -> None:
    first, second = (load_model(broken, backend="hooked", device="cpu") for _ in range(2))
    view(first).weight((0, "Q")).zero_()
    assert view(second).weight((0, "Q")).any()


@needs_hooked
def test_the_context_is_that_of_the_config() -> None:
    """HookedTransformer has 2048 tokens for every Mistral."""
    found = [load_model(families.directory("Mistral"), backend=b, device="cpu") for b in tiny.BACKENDS]
    assert [view(model).n_ctx for model in found] == [128, 128]


def write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: write(d / "config.json", "{"), "config.json cannot be read"),
        (lambda d: (d / "model.safetensors").unlink(), "no weights"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\0" * 50), "cannot be loaded"),
        (lambda d: [p.unlink() for p in d.glob("tokenizer*")], "no tokenizer"),
        (lambda d: write(d / "tokenizer.json", "{}"), "cannot be loaded"),
        (lambda d: write(d / "config.json", '{"model_type": "no-such-thing"}'), "cannot be loaded"),
        (
            lambda d: write(d / "config.json", '{"model_type": "t5", "is_encoder_decoder": true}'),
            "encoder-decoder",
        ),
    ],
)
def test_broken_directories_are_one_clear_error(broken: Path, breakage: Any, message: str) -> None:
    breakage(broken)
    with pytest.raises(TomsparseError, match=message) as caught:
        load_model(broken, device="cpu")
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quantised_models_are_refused(broken: Path) -> None:
    path = broken / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(config))
    with pytest.raises(TomsparseError, match="quantised"):
        load_model(broken)


@pytest.mark.parametrize("source", ["/no/such/dir", "./nothing", "a/b/c", Path("nothing"), ""])
def test_directories_that_do_not_exist(source: Any) -> None:
    with pytest.raises(TomsparseError, match="no model directory"):
        load_model(source)


def test_a_name_that_is_not_on_the_hub_or_no_network() -> None:
    with pytest.raises(TomsparseError, match=r"'nobody/nothing' cannot be loaded.*network") as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_directory(broken: Path) -> None:
    with pytest.raises(TomsparseError, match="is a file"):
        load_model(broken / "config.json")


def test_options_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(TomsparseError, match="backend='bird'"):
        load_model("nobody/nothing", backend="bird")  # type: ignore[arg-type]
    with pytest.raises(TomsparseError, match="device='abacus'"):
        load_model("nobody/nothing", device="abacus")
    with pytest.raises(TomsparseError, match="float32"):
        load_model("nobody/nothing", dtype=torch.int8)
