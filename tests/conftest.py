"""Settings for every test: no network, one thread, quiet libraries."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()

# A shell starts background jobs with Ctrl-C ignored; the tests that send it need it as in the foreground.
signal.signal(signal.SIGINT, signal.default_int_handler)
