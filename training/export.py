"""Turn a training run into the embedded model: `python training/export.py training/runs/main`.

Writes a plain Hugging Face directory (half-precision safetensors, tokenizer) into the package, keeps the log
of the run and some of its snapshots beside the training code. The model card is written by `card.py`
afterwards.

    python training/export.py --snapshot training/checkpoints/20000000.safetensors --to DIRECTORY

makes a directory of how the embedded model was at some point of its training.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from model import Decoder, model_config, to_hugging_face
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from variety import ALL_NAMES

from tl_tomsparse.models import EMBEDDED

HERE = Path(__file__).parent
KEPT = (10, 20, 40, 60)  # million tokens: before it tells agents apart, while it learns to, and after


def write(state: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast, to: Path) -> None:
    """A Hugging Face directory; what was in it is removed."""
    decoder = Decoder(model_config(tokenizer), len(ALL_NAMES))
    decoder.load_state_dict(state)
    shutil.rmtree(to, ignore_errors=True)
    to_hugging_face(decoder).half().save_pretrained(to)
    tokenizer.save_pretrained(to)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="folder of the training run")
    parser.add_argument("--snapshot", type=Path, help="instead of a run, one of `checkpoints`")
    parser.add_argument("--to", type=Path, default=EMBEDDED)
    args = parser.parse_args()
    if (args.run is None) == (args.snapshot is None):
        parser.error("pass the folder of a run, or --snapshot")
    if args.snapshot is not None:
        if args.to == EMBEDDED:
            parser.error("--snapshot needs --to DIRECTORY")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(EMBEDDED)
        write({name: value.float() for name, value in load_file(args.snapshot).items()}, tokenizer, args.to)
        return
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.run / "tokenizer")
    write(torch.load(args.run / "checkpoint.pt", weights_only=True)["decoder"], tokenizer, args.to)
    log = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    kept = [entry for i, entry in enumerate(log) if "probe" in entry or i % 5 == 0 or i + 1 == len(log)]
    (HERE / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    shutil.rmtree(HERE / "checkpoints", ignore_errors=True)
    (HERE / "checkpoints").mkdir()
    for millions in KEPT:
        snapshot = args.run / f"snapshot-{millions}000000.safetensors"
        if snapshot.exists():
            shutil.copyfile(snapshot, HERE / "checkpoints" / f"{millions}000000.safetensors")


if __name__ == "__main__":
    main()
