"""A quick look at accuracies during training, on the dev split only: plain Hugging Face, one prompt a
question.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from model import autocast
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tl_tomsparse.stories import Story, generate_stories


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stories: list[Story]
) -> list[list[bool]]:
    """For each story and question, whether the answer is the likeliest option."""
    prompts = [
        (s, q, [tokenizer.bos_token_id, *tokenizer(s.prompt(q), add_special_tokens=False)["input_ids"]])
        for s in stories
        for q in s.questions
    ]
    right: dict[int, bool] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][2]))
    for start in range(0, len(order), 256):
        chunk = order[start : start + 256]
        width = max(len(prompts[i][2]) for i in chunk)
        tokens = torch.tensor(
            [prompts[i][2] + [tokenizer.pad_token_id] * (width - len(prompts[i][2])) for i in chunk]
        )
        tokens = tokens.to(model.device)
        with autocast(model.device):
            hidden = model.base_model(tokens, use_cache=False).last_hidden_state
        ends = torch.tensor([len(prompts[i][2]) - 1 for i in chunk])
        logits = model.lm_head(hidden[torch.arange(len(chunk)), ends].float())
        for i, row in zip(chunk, logits):
            question = prompts[i][1]
            ids = [tokenizer(option, add_special_tokens=False)["input_ids"][0] for option in question.options]
            right[i] = question.options[int(row[ids].argmax())] == question.answer
    flat = iter(range(len(prompts)))
    return [[right[next(flat)] for _ in s.questions] for s in stories]


def probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n: int = 120, seed: int = 7
) -> dict[str, float]:
    """Accuracy by category, and paired: all first-order beliefs of a false-belief story right together."""
    out: dict[str, float] = {}
    for wording in ("seen", "new"):
        stories = generate_stories(n, seed=seed, split="dev", wording=wording)
        right = answers(model, tokenizer, stories)
        by: dict[str, list[bool]] = defaultdict(list)
        for story, marks in zip(stories, right):
            beliefs = [mark for q, mark in zip(story.questions, marks) if q.order == 1]
            for question, mark in zip(story.questions, marks):
                by[question.category].append(mark)
            if story.condition == "false_belief":
                by["paired"].append(all(beliefs))
                by[f"paired_{story.scenario}"].append(all(beliefs))
        for name, marks in sorted(by.items()):
            out[name if wording == "seen" else f"new_{name}"] = round(sum(marks) / len(marks), 3)
    return out
