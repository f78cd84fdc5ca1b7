"""Stories whose beliefs are computed: epistemic logic, scenarios, generation. No torch."""

from .formats import from_dataset, read_jsonl, to_dataset, write_jsonl
from .general import generate_texts
from .generate import generate_stories
from .labels import relabelled
from .story import CATEGORIES, Question, Story

__all__ = [
    "CATEGORIES",
    "Question",
    "Story",
    "from_dataset",
    "generate_stories",
    "generate_texts",
    "read_jsonl",
    "relabelled",
    "to_dataset",
    "write_jsonl",
]
