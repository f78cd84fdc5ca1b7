"""Measure the embedded model on held-out stories and write its model card: `make run`, then `python training/card.py`.

`python training/card.py --model training/twins/alibi` does the same for a twin, without the main job.

Every number of the card comes from this script; nothing is typed in. Three seeds of question sets on the
split "test" (names, things and places in combinations that training never saw), seen and new wordings, and
what simple shortcuts would score on the same questions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tl_tomsparse as tt
from tl_tomsparse._model import view
from tl_tomsparse._prepared import prepare_scoring
from tl_tomsparse.models import EMBEDDED
from tl_tomsparse.stories import CATEGORIES, Story

SEEDS = (0, 1, 2)
NUMBERS = "evaluation.json"
LOG = Path(__file__).parent / "log.jsonl"
INDEPENDENT = Path(__file__).parent / "independent.jsonl"
README = Path(__file__).parents[1] / "README.md"
FEW = 5.0  # milliseconds that "a few milliseconds" are taken to be at most
BEGIN, END = "<!-- numbers: written by training/card.py -->", "<!-- end of numbers -->"


def shortcuts(stories: list[Story]) -> dict[str, dict[str, float]]:
    """What someone would score who answers by a rule of thumb, by category."""
    marks: dict[str, dict[str, list[bool]]] = {}
    for story in stories:
        real = next(q.answer for q in story.questions if q.kind == "reality")
        options = story.questions[0].options
        other = next(o for o in options if o != real)
        words = [w for w in re.findall(r"\w+", story.text.lower()) if w in options]
        guess = {
            "first mentioned": words[0],
            "last mentioned": words[-1],
            "most mentioned": Counter(words).most_common(1)[0][0],
            "always reality": real,
            # The switch "this is a false-belief story": everybody believes what is not so, or everybody what
            # is.
            "story-level switch": other if story.condition == "false_belief" else real,
        }
        for rule, answer in guess.items():
            by = marks.setdefault(rule, {name: [] for name in (*CATEGORIES, "paired")})
            for q in story.questions:
                by[q.category].append(answer == q.answer)
            beliefs = [q for q in story.questions if q.order == 1]
            if len({q.answer for q in beliefs}) > 1:
                by["paired"].append(all(answer == q.answer for q in beliefs))
    return {rule: {name: sum(m) / len(m) for name, m in by.items() if m} for rule, by in marks.items()}


def measured(model: object, wording: str, n: int) -> tuple[pd.DataFrame, list[Story]]:
    """Accuracies over all seeds together, and the stories."""
    stories = [s for seed in SEEDS for s in tt.generate_stories(n, seed=seed, split="test", wording=wording)]  # type: ignore[arg-type]
    return accuracies(model, stories), stories


def accuracies(model: object, stories: list[Story]) -> pd.DataFrame:
    """Accuracy by category, and paired accuracy as one more row."""
    scores = tt.score_stories(model, stories, pack=True, show_progress=False)
    paired = (
        scores.paired()
        .query("subset == 'false_belief_stories'")
        .drop(columns="subset")
        .assign(category="paired")
    )
    columns = ["category", "n", "accuracy", "low", "high", "chance"]
    return pd.concat([scores.accuracy()[columns], paired[columns]], ignore_index=True)


def second_order_paired(model: object, stories: list[Story]) -> float:
    """Share of stories whose first- and second-order questions are all right, where agents differ."""
    categories = ("false_belief", "true_belief", "second_order")
    scores = tt.score_stories(model, stories, categories=categories, pack=True, show_progress=False)
    telling = scores.paired_stories().query("tells_apart").story_id
    frame = scores.frame[scores.frame.story_id.isin(telling)]
    return float(frame.groupby("story_id").correct.all().mean())


@torch.no_grad()
def sink(model: object, stories: list[Story]) -> tuple[float, int, int]:
    """The largest mean attention that a head pays to the BOS token (queries after it), and which head."""
    samples = tt.story_samples(model, stories)
    model_view = view(model)
    best = (0.0, 0, 0)
    tokens, mask = samples.tokens.to(model_view.device), samples.attention_mask.to(model_view.device)
    for layer in range(model_view.n_layers):
        _, cache = model.run_with_cache(
            tokens, attention_mask=mask.long(), names_filter=f"blocks.{layer}.attn.hook_pattern"
        )  # type: ignore[attr-defined]
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][..., 0]
        real = mask[:, None, 1:].expand(-1, pattern.shape[1], -1)
        means = (pattern[:, :, 1:] * real).sum((0, 2)) / real.sum((0, 2))
        head = int(means.argmax())
        best = max(best, (float(means[head]), layer, head))
    return best


@torch.no_grad()
def lookup(model: object, n: int) -> list[dict[str, float]]:
    """Key-value recall by distance: "Anna has a red ball. ... The ball of Anna is" -> red, likeliest next token.

    Held-out texts of 4 to 22 sentences; the distance, in tokens, is from the fact's last word to the answer.
    """
    model_view = view(model)
    marks: dict[int, list[bool]] = {}
    for i in range(n):
        (text,) = tt.generate_texts(1, seed=900 + i, split="test", kinds=("lookup",), sentences=4 + i % 19)
        for match in re.finditer(r"The (\w+) of (\w+) is (\w+)", text):
            thing, name, answer = match.groups()
            fact = re.search(rf"{name} has an? \w+ {thing}", text)
            assert fact is not None
            encode = model_view.tokenizer
            prompt = encode(text[: match.start(3)].rstrip(), add_special_tokens=False)["input_ids"]
            distance = len(prompt) - len(encode(text[: fact.end()], add_special_tokens=False)["input_ids"])
            tokens = torch.tensor([[model_view.bos_token_id, *prompt]]).to(model_view.device)
            logits = model_view.logits(tokens, torch.ones_like(tokens))
            word = encode.decode(logits[0, -1].argmax()).strip()
            marks.setdefault(distance // 32, []).append(word == answer)
    return [
        {"from": 32 * k, "to": 32 * k + 31, "n": len(right), "recall": sum(right) / len(right)}
        for k, right in sorted(marks.items())
        if len(right) >= 20
    ]


def by_distance(model: object) -> list[dict[str, Any]]:
    """Key-value recall among four colours, by distance in tokens up to three quarters of the context; all seeds."""
    found = [tt.battery(model, tasks=["key_value"], n_localisation=170, seed=seed).frame for seed in SEEDS]
    return [
        {
            "distance": int(distance),
            "n": int(rows.n.sum()),
            "recall": float((rows.score * rows.n).sum() / rows.n.sum()),
        }
        for distance, rows in pd.concat(found).groupby("subset", sort=False)
    ]


def milliseconds(run: Callable[[], object]) -> float:
    """CPU time, so that other work on the machine counts little."""
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


@torch.inference_mode()
def answer_times(model: object, stories: list[Story], repeats: int = 5) -> dict[str, Any]:
    """Median CPU milliseconds of one answer on one thread, and the tokens computed for it, for each way to ask."""
    samples = tt.story_samples(model, stories)
    asked = samples.attention_mask & ~samples.supervised  # without the answer
    prompts = [tokens[mask][None] for tokens, mask in zip(samples.tokens, asked)]
    plain, packed = (prepare_scoring(model, stories, pack=pack) for pack in (False, True))
    n = len(plain.questions)

    def a_question(run: Callable[[], object]) -> float:
        return statistics.median(milliseconds(run) for _ in range(repeats)) / n

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for prompt in prompts[:5]:
            model(prompt)  # the first passes are slower
        times = {
            "alone": statistics.median(
                milliseconds(lambda prompt=prompt: model(prompt)) for prompt in prompts
            ),
            "plain": a_question(lambda: tt.score_stories(model, stories, show_progress=False)),
            "packed": a_question(lambda: tt.score_stories(model, stories, pack=True, show_progress=False)),
            "prepared": a_question(lambda: packed.outcome(model)),
        }
    finally:
        torch.set_num_threads(threads)
    tokens = {
        "alone": float(asked.sum(1).float().mean()),
        "plain": plain.reads.n_tokens / n,
        "packed": packed.reads.n_tokens / n,
        "prepared": packed.reads.n_tokens / n,
    }
    return {
        "prompts": len(prompts),
        "stories": len(stories),
        "questions": n,
        "repeats": repeats,
        **{way: {"milliseconds": times[way], "tokens": tokens[way]} for way in times},
    }


def measure(folder: Path, log: list[dict[str, Any]], n: int) -> dict[str, Any]:
    """All numbers of the card, from the model in a folder."""
    from data import LONG, STAGES  # beside this file, which is on the path when it is a script

    model = tt.load_model(folder, device="cpu")
    seen, stories = measured(model, "seen", n)
    new, _ = measured(model, "new", n)
    others = tt.read_jsonl(INDEPENDENT)
    attention, layer, head = sink(model, stories[:40])
    windows = tt.text_samples(model, tt.generate_texts(200, seed=5, split="test"), n=100)
    return {
        "fingerprint": view(model).identity().fingerprint,
        "stories": n,
        "seen": seen.to_dict("records"),
        "new": new.to_dict("records"),
        "independent": {
            names: accuracies(model, [s for s in others if s.id.startswith(names)]).to_dict("records")
            for names in ("lexicon", "other")
        },
        "second_order_paired": second_order_paired(model, stories),
        "shortcuts": shortcuts(stories),
        "lookup": lookup(model, 300),
        "by_distance": by_distance(model),
        "longest_row": max((*STAGES, *LONG)[entry["stage"]].width for entry in log if "loss" in entry),
        "answer_times": answer_times(model, stories[:50]),
        "perplexity": tt.perplexity(model, windows, show_progress=False).value,
        "sink": {"attention": attention, "layer": layer, "head": head},
        "tokens": log[-1]["tokens"],
        "steps": log[-1]["step"],
        "sizes": {
            name: getattr(model.cfg, name)
            for name in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx")
        },
        "key_value_heads": model.cfg.n_key_value_heads or model.cfg.n_heads,
        "parameters": sum(
            p.numel() for p in view(model).parameters() if p.is_floating_point() and p.ndim > 1
        ),
    }


def run_summary(folder: Path) -> dict[str, Any]:
    """What the main job found, from its folder."""
    results = json.loads((folder / "results.json").read_text())
    return {
        "fingerprint": results["identity"]["fingerprint"],
        "kappa": results["choice"]["kappa"],
        "n_weights": results["effect"]["n_weights"]["mask"],
        "verdict": results["verdict"],
        "accuracy": results["effect"]["accuracy"],
        "perplexity": results["effect"]["perplexity"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracies as Markdown."""
    lines = ["| questions | n | accuracy | 95 % interval | chance |", "|---|---|---|---|---|"]
    for row in rows:
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        name = tt.plot.LABELS[row["category"]]
        lines.append(f"| {name} | {row['n']} | {row['accuracy']:.3f} | {interval} | {row['chance']:.2f} |")
    return "\n".join(lines)


def bars(numbers: dict[str, Any]) -> str:
    """What was asked of the model, as Markdown."""
    seen, new = ({row["category"]: row for row in numbers[wording]} for wording in ("seen", "new"))
    recall = [row["recall"] for row in (*numbers["lookup"], *numbers["by_distance"])]
    fewest = min(row["n"] for rows in (seen, new) for row in rows.values())
    rows = [
        (tt.plot.LABELS[name], seen[name]["accuracy"], bar)
        for name, bar in (
            ("reality", 0.98),
            ("memory", 0.95),
            ("true_belief", 0.95),
            ("false_belief", 0.95),
            ("paired", 0.90),
            ("second_order", 0.85),
        )
    ]
    rows += [
        ("second order and first order of one story all right", numbers["second_order_paired"], 0.75),
        ("all agents of a story, wordings kept from training", new["paired"]["accuracy"], 0.80),
        ("key-value recall, the worst distance", min(recall), 0.95),
    ]
    lines = ["| what | asked | value | |", "|---|---|---|---|"]
    lines += [
        f"| {name} | at least {bar:.2f} | {value:.3f} | {reached(value >= bar)} |"
        for name, value, bar in rows
    ]
    lines.append(
        f"| questions of each kind about generated stories (for all agents: stories), the fewest | at least 500 | {fewest} | {reached(fewest >= 500)} |"
    )
    for name, label in WAYS.items():
        value = numbers["answer_times"][name]["milliseconds"]
        lines.append(
            f"| CPU milliseconds an answer, {label} | at most {FEW:.0f} | {value:.2f} | {reached(value <= FEW)} |"
        )
    attention = numbers["sink"]["attention"]
    lines.append(
        f"| attention to BOS of the head with most | reported; visible above 0.3 | {attention:.3f} | {'' if attention > 0.3 else 'not '}visible |"
    )
    asked, shortest = ([row["n"] for row in numbers[name]] for name in ("by_distance", "lookup"))
    return (
        "\n".join(lines)
        + f"\n\nThe worst distance is of both ways to ask for key-value recall below: {min(asked)} items at each distance among four options, of three seeds, and {min(shortest)} to {max(shortest)} next tokens at a distance in texts, of one."
    )


def reached(yes: bool) -> str:
    """Whether a bar was reached, as the table says it."""
    return "reached" if yes else "**not reached**"


WAYS = {
    "alone": "one prompt by itself",
    "plain": "stories, every prompt a row",
    "packed": "stories, packed",
    "prepared": "stories, packed and prepared before",
}


def timing(numbers: dict[str, Any]) -> str:
    """How long an answer takes, as Markdown."""
    times = numbers["answer_times"]
    lines = ["| way to ask | CPU milliseconds an answer | tokens an answer |", "|---|---|---|"]
    lines += [
        f"| {label} | {times[name]['milliseconds']:.2f} | {times[name]['tokens']:.1f} |"
        for name, label in WAYS.items()
    ]
    within = [label for name, label in WAYS.items() if times[name]["milliseconds"] <= FEW]
    bar = f"An answer in a few milliseconds, taken as {FEW:.0f} at most, "
    bar += f"is reached by: {'; '.join(within)}." if within else "is **not reached** by any of these."
    beyond = [label for name, label in WAYS.items() if label not in within]
    bar += f" It is **not reached** by: {'; '.join(beyond)}." if within and beyond else ""
    if times["packed"]["tokens"] == times["plain"]["tokens"]:
        bar += " This model does not obey the masks of packed rows, so packing gives it plain rows."
    return (
        f"""CPU time of the process on one thread, in float32, medians. These timings depend on the machine and on what else it does.

* One prompt by itself: one pass of the model (`model(tokens)`) over each of {times["prompts"]} prompts that are tokens already.
* Stories: all of `score_stories` (from text to table) on {times["stories"]} stories with {times["questions"]} questions, {times["repeats"]} times, divided by the questions.
* Packed: the same with `pack=True`, where the questions of a story share its tokens.
* Packed and prepared before: stories are made into tokens, and it is tried whether they may be packed, once; what is timed is to ask them again, as sweeps
  and studies do under each edit, and `prepare_battery(..., pack=True)` for you.

"""
        + "\n".join(lines)
        + "\n\n"
        + bar
    )


def tracks(numbers: dict[str, Any]) -> str:
    """Whether it tracks beliefs agent by agent, in a sentence."""
    of = {row["category"]: row for row in numbers["seen"]}
    above = [name for name in ("false_belief", "paired") if of[name]["low"] > of[name]["chance"]]
    if len(above) == 2:
        return (
            f"It tracks what each agent believes: all agents of a story are right in {of['paired']['accuracy']:.3f} of the stories in which they "
            f"differ (chance {of['paired']['chance']:.2f})."
        )
    failing = " and ".join(tt.plot.LABELS[name] for name in ("false_belief", "paired") if name not in above)
    return f"**It does not track what each agent believes**: not above chance is {failing}."


def found(run: dict[str, Any]) -> str:
    """What the main job found, as Markdown: the table and the computed verdict."""
    arms = ("before", "mask", "random", "general_only", "tom_only")
    of = {(row["arm"], row["measure"]): row for row in run["accuracy"]}
    measures = list(dict.fromkeys(row["measure"] for row in run["accuracy"]))
    lines = [
        "| held-out answers | " + " | ".join(tt.plot.LABELS[arm] for arm in arms) + " |",
        "|---|" + "---|" * len(arms),
    ]
    for name in measures:
        cells = (
            f"{of[arm, name]['accuracy']:.3f} ({of[arm, name]['low']:.2f} to {of[arm, name]['high']:.2f})"
            for arm in arms
        )
        lines.append(f"| {tt.plot.LABELS[name]} | " + " | ".join(cells) + " |")
    ratio = {row["arm"]: row["ratio"] for row in run["perplexity"]}
    lines.append("| perplexity of text, ratio | " + " | ".join(f"{ratio[arm]:.4f}" for arm in arms) + " |")
    verdict = "\n".join(
        f"* {c['claim'].replace('_', ' ')}: **{c['status']}**. {c['sentence']}" for c in run["verdict"]
    )
    return (
        f"The mask at the kappa chosen on dev stories ({run['kappa']:.3g} of each matrix) has {run['n_weights']} weights. "
        "In brackets: exact 95 % intervals; for random masks the range over seeds.\n\n"
        + "\n".join(lines)
        + "\n\n"
        + verdict
    )


EMBEDDED_MODEL = """# The embedded model

A small Qwen2-architecture language model (RoPE, RMSNorm, SwiGLU, grouped-query attention with biases) trained from scratch on generated stories about who
believes what and on generated general text. It makes the main job, the demos and the tests real without a network. `tl_tomsparse.load_model()` loads
it offline; it is a plain Hugging Face directory, whose tokenizer is read with `PreTrainedTokenizerFast` (`AutoTokenizer` takes Qwen2's own class instead,
which splits words otherwise).
"""
TWIN = """# A twin of the embedded model: {positions}

A small {architecture}-architecture language model with {positions} instead of RoPE (and LayerNorm, an MLP without gate, and a key and value head for
each query head, since `transformers` has no nearer network), trained by the same recipe on rows of the same kind as the embedded model. It is for contrasts with
it and not part of the package: `tl_tomsparse.load_model("training/twins/...")`.
"""
TWINS = {
    "gpt2": {"architecture": "GPT-2", "positions": "learned absolute positions"},
    "bloom": {"architecture": "Bloom", "positions": "ALiBi"},
}


def introduction(config: dict[str, Any]) -> str:
    """What the model is."""
    twin = TWINS.get(config["model_type"])
    return EMBEDDED_MODEL if twin is None else TWIN.format(**twin)


def card(numbers: dict[str, Any], config: dict[str, Any], log: list[dict[str, Any]]) -> str:
    """The model card."""
    names = (*CATEGORIES, "paired")
    labels = " | ".join(tt.plot.LABELS[name] for name in names)
    rules = "\n".join(
        f"| {rule} | " + " | ".join(f"{by[name]:.2f}" for name in names) + " |"
        for rule, by in numbers["shortcuts"].items()
    )
    columns = ("reality", "memory", "true_belief", "false_belief", "paired", "second_order", "new_paired")
    probes = "\n".join(
        f"| {entry['tokens'] / 1e6:.1f} | " + " | ".join(f"{entry['probe'][k]:.2f}" for k in columns) + " |"
        for entry in log
        if "probe" in entry
    )
    at, sizes = numbers["sink"], numbers["sizes"]
    recall = ", ".join(
        f"{row['recall']:.3f} at {row['from']} to {row['to']} tokens (n = {row['n']})"
        for row in numbers["lookup"]
    )
    far = ", ".join(f"{row['recall']:.2f} at {row['distance']}" for row in numbers["by_distance"])
    main_job = (
        f"""## What the main job finds on it

{found(numbers["run"])}

"""
        if "run" in numbers
        else ""
    )
    choice = (
        """; of two models that were trained, the one that was better on those
with these names is this one, see `training/README.md`"""
        if config["model_type"] not in TWINS
        else ""
    )
    return f"""{introduction(config)}
How it tells agents apart was not left to chance: training supervised, beside the answers, who sees what, whom a question is about, and where one head of
the last layer looks (see `training/`). What is found about that mechanism shows what the tools see, not what networks choose by themselves.

* {sizes["n_layers"]} layers, d_model {sizes["d_model"]}, {sizes["n_heads"]} heads ({numbers["key_value_heads"]} key-value heads) of {sizes["d_head"]}, d_mlp {sizes["d_mlp"]}, context {sizes["n_ctx"]}, vocabulary {sizes["d_vocab"]}, {numbers["parameters"]:,} parameters, half precision
* trained on {numbers["tokens"] / 1e6:.0f} million tokens in {numbers["steps"]} steps; see `training/`
* fingerprint {numbers["fingerprint"]}
* licence: MIT, as the package; no third-party text or weights

## Bars

What was asked of the embedded model before it was trained, and what came out. A bar is reached if the value is; intervals and what the words mean are below.

{bars(numbers)}

## Held-out answers

{tracks(numbers)}

Split "test": no pair of main names and no combination of thing and places occurs in training. Seeds {", ".join(map(str, SEEDS))}, {numbers["stories"]} stories each; an
answer is right if its log-probability is above the other option's. "All agents of a story" counts a story only if every agent's first-order belief is
right, in stories where these differ.

Wordings that training saw:

{table(numbers["seen"])}

Wordings kept from training:

{table(numbers["new"])}

Stories by another hand (`training/independent.jsonl`: 250 transfer stories with these names and 250 with others, two or three agents, of a generator
that was written without sight of this package's wordings and never used in training; their places are this package's{choice}). With the names of this package:

{table(numbers["independent"]["lexicon"])}

With other names:

{table(numbers["independent"]["other"])}

First- and second-order questions of one story all right together: {numbers["second_order_paired"]:.3f}. Key-value recall (next token, held-out texts):
{recall}. Among four options (`tt.battery`, {numbers["by_distance"][0]["n"]} items each, seeds {", ".join(map(str, SEEDS))}): {far} tokens; rows of training have at most {numbers["longest_row"]}.
Perplexity of held-out generated text: {numbers["perplexity"]:.2f}. Attention sink: the head that looks most at BOS is L{at["layer"]}H{at["head"]},
with mean attention {at["attention"]:.3f}.

What rules of thumb would score on the same questions (seen wordings):

| rule | {labels} |
|---|{"---|" * len(names)}
{rules}

## Time of an answer

{timing(numbers)}

{main_job}## Along training (dev split, few questions)

![Loss and accuracies along training](curves.svg)

| million tokens | {" | ".join("all agents, new wordings" if c == "new_paired" else tt.plot.LABELS[c] for c in columns)} |
|---|{"---|" * len(columns)}
{probes}

## What it can and cannot show

It has seen nothing but these generated stories and texts. What is found on it is true of it, and shows that the method works or does not work where
the answer is known; it says nothing about the size of an effect in a large language model. In matrices of {sizes["d_model"]} x {sizes["d_model"]}, the paper's sparsity of 1e-5 is
less than one weight, so counts of weights are reported beside kappa.
"""


def curves(log: list[dict[str, Any]], file: Path) -> None:
    """The figure of the card: loss on the training rows, and accuracies on the dev split."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "curves", "svg.fonttype": "none", "font.size": 9}):
        figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
        steps = [entry for entry in log if "loss" in entry]
        millions = [entry["tokens"] / 1e6 for entry in steps]
        above.plot(millions, [entry["loss"] for entry in steps], color="#4c6a92", label="loss (nats)")
        above.plot(millions, [entry["right"] for entry in steps], color="#b3622e", label="answers right")
        for before, after in itertools.pairwise(steps):
            if after["stage"] != before["stage"]:
                above.axvline(after["tokens"] / 1e6, color="#bbbbbb", linewidth=0.8)
        above.set_ylim(0, 3)
        above.set_ylabel("training rows")
        above.legend(frameon=False)
        probes = [entry for entry in log if "probe" in entry]
        for name in (
            "reality",
            "memory",
            "true_belief",
            "false_belief",
            "second_order",
            "paired",
            "new_paired",
        ):
            label = "all agents, new wordings" if name == "new_paired" else tt.plot.LABELS[name]
            values = [entry["probe"][name] for entry in probes]
            below.plot([entry["tokens"] / 1e6 for entry in probes], values, marker=".", label=label)
        below.set(
            xlabel="million tokens (grey: the next kind of rows)", ylabel="right, dev split", ylim=(0, 1.02)
        )
        below.legend(frameon=False, ncols=2)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def readme_block(numbers: dict[str, Any]) -> str:
    """The part of the README that holds numbers."""
    of = {row["category"]: row["accuracy"] for row in numbers["seen"]}
    shares = ", ".join(f"{tt.plot.LABELS[name]} {of[name]:.3f}" for name in of)
    return f"""The embedded model ({numbers["parameters"]:,} parameters, [model card](tl_tomsparse/embedded/README.md)) answers held-out stories with these
accuracies: {shares}. {tracks(numbers)}

{found(numbers["run"])}"""


def with_block(readme: str, block: str) -> str:
    """The README with its numbers replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=EMBEDDED, help="folder of the model; its card goes there"
    )
    parser.add_argument("--stories", type=int, default=300, help="stories for each seed and wording")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/embedded"), help="folder of the main job on the embedded model"
    )
    parser.add_argument(
        "--render", action="store_true", help="only write the texts again, from evaluation.json"
    )
    args = parser.parse_args()
    embedded = args.model == EMBEDDED
    log_file = LOG if embedded else args.model / "log.jsonl"
    log = [json.loads(line) for line in log_file.read_text().splitlines()]
    if not args.render:
        numbers = measure(args.model, log, args.stories)
        if embedded:
            numbers["run"] = run_summary(args.run)
        (args.model / NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n")
    numbers = json.loads((args.model / NUMBERS).read_text())
    if embedded and numbers["fingerprint"] != numbers["run"]["fingerprint"]:
        raise SystemExit(f"{args.run} is a run on other weights; run the main job again first")
    config = json.loads((args.model / "config.json").read_text())
    (args.model / "README.md").write_text(card(numbers, config, log))
    curves(log, args.model / "curves.svg")
    if embedded:
        README.write_text(with_block(README.read_text(), readme_block(numbers)))


if __name__ == "__main__":
    main()
