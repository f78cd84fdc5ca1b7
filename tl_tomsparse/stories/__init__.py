"""Stories whose beliefs are computed: epistemic logic, scenarios, generation. No torch."""

from .benchmarks import read_benchmark
from .formats import from_dataset, read_jsonl, to_dataset, write_jsonl
from .general import generate_texts
from .generate import generate_stories
from .labels import relabelled
from .photographs import generate_photographs
from .story import ALL_CATEGORIES, CATEGORIES, Question, Story

__all__ = [
    "ALL_CATEGORIES",
    "CATEGORIES",
    "Question",
    "Story",
    "from_dataset",
    "generate_photographs",
    "generate_stories",
    "generate_texts",
    "read_benchmark",
    "read_jsonl",
    "relabelled",
    "to_dataset",
    "write_jsonl",
]
