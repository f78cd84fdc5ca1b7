"""Turn a training run into the embedded model: `python training/export.py training/runs/main`.

Writes a plain Hugging Face directory (half-precision safetensors, tokenizer) into the package, keeps the log
of the run and some of its snapshots beside the training code. The model card is written by `card.py`
afterwards.

    python training/export.py training/runs/alibi --to training/twins/alibi

makes a directory of a twin, with its log, and

    python training/export.py --snapshot training/checkpoints/0040.safetensors --to DIRECTORY

one of how the embedded model was at some point of its training.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from model import Decoder, Shape, to_hugging_face
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tl_tomsparse.models import EMBEDDED

HERE = Path(__file__).parent
KEPT = (10, 40, 80)  # million tokens: before it tells agents apart, while it learns to, and after


def write(state: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast, to: Path) -> None:
    """A Hugging Face directory; what was in it is removed."""
    decoder = Decoder(Shape.of(state), len(state["witness.bias"]))
    decoder.load_state_dict(state)
    shutil.rmtree(to, ignore_errors=True)
    to_hugging_face(decoder, tokenizer).half().save_pretrained(to)
    tokenizer.save_pretrained(to)


def short_log(run: Path) -> str:
    """Every fifth entry, every look at the dev split, and the last entry."""
    lines = (run / "log.jsonl").read_text().splitlines()
    kept = (line for i, line in enumerate(lines) if "probe" in json.loads(line) or i % 5 == 0)
    return "\n".join(dict.fromkeys([*kept, lines[-1]])) + "\n"


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
    if args.snapshot is not None and args.to == EMBEDDED:
        parser.error("--snapshot needs --to DIRECTORY")
    snapshots = sorted(args.run.glob("snapshot-*.safetensors")) if args.run else [args.snapshot]
    if not snapshots:
        parser.error(f"there is no snapshot in {args.run}; train first")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.run / "tokenizer" if args.run else EMBEDDED)
    state = load_file(snapshots[-1])
    if args.to == EMBEDDED and not Shape.of(state).rotary:
        parser.error(f"{args.run} is the run of a twin; pass --to DIRECTORY")
    write(state, tokenizer, args.to)
    if args.run is None:
        return
    if args.to != EMBEDDED:
        (args.to / "log.jsonl").write_text(short_log(args.run))
        return
    (HERE / "log.jsonl").write_text(short_log(args.run))
    shutil.rmtree(HERE / "checkpoints", ignore_errors=True)
    (HERE / "checkpoints").mkdir()
    for millions in KEPT:
        name = f"{millions:04d}.safetensors"
        shutil.copyfile(args.run / f"snapshot-{name}", HERE / "checkpoints" / name)


if __name__ == "__main__":
    main()
