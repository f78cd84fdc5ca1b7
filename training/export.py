"""Turn a training run into the embedded model: `python training/export.py training/runs/main`.

Writes a plain Hugging Face directory (half-precision safetensors, tokenizer) into the package, and keeps the
log of the run beside the training code. The model card is written by `card.py` afterwards.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from model import Decoder, model_config, to_hugging_face
from transformers import AutoTokenizer

from tl_tomsparse.models import EMBEDDED
from tl_tomsparse.stories.lexicon import NAMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the training run")
    parser.add_argument("--to", type=Path, default=EMBEDDED)
    args = parser.parse_args()
    saved = torch.load(args.run / "checkpoint.pt", weights_only=True)
    tokenizer = AutoTokenizer.from_pretrained(args.run / "tokenizer")
    decoder = Decoder(model_config(tokenizer), len(NAMES))
    decoder.load_state_dict(saved["decoder"])
    shutil.rmtree(args.to, ignore_errors=True)
    to_hugging_face(decoder).half().save_pretrained(args.to)
    tokenizer.save_pretrained(args.to)
    log = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    kept = [entry for i, entry in enumerate(log) if "probe" in entry or i % 5 == 0 or i + 1 == len(log)]
    (Path(__file__).parent / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in kept))


if __name__ == "__main__":
    main()
