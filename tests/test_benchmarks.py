"""Readers of published sets, on small files written by hand in each layout."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

import tl_tomsparse as tt
from tests import oracles, tiny
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._prepared import prepare_scoring

BIGTOM = [
    "Lea bakes rolls. Lea wants them soft. Lea sets the oven low. Lea believes the oven is low. "
    "A child turns the oven up.",
    "Lea watches the child.",
    "Lea does not watch the child.",
    "Lea turns the oven down.",
    "Lea waits for an hour.",
    "Does Lea believe the oven is low or high?",
    "Does Lea want soft or hard rolls?",
    "What will Lea do?",
    "Lea believes the oven is high.",
    "Lea wants soft rolls.",
    "Lea will turn the oven down.",
    "Lea believes the oven is low.",
    "Lea wants soft rolls.",
    "Lea will wait for an hour.",
    "A cat jumps on a chair.",
    "Lea watches the cat.",
    "Lea does not watch the cat.",
    "auto",
    "0",
]
_TOLD = (
    "1 Ida, Jo and Kai entered the den.\n2 The pear is in the red_box.\n3 Ida exited the den.\n"
    "4 Jo moved the pear to the tin.\n"
)


def hitom_item(order: int, question: str, answer: str, **changes):
    item = {
        "prompting_type": "VP",
        "deception": False,
        "story_length": 1,
        "question_order": order,
        "sample_id": order,
        "story": f"Some instruction.\n{_TOLD}\n",
        "question": question,
        "choices": "A. red_box, B. tin, C. blue_bag",
        "answer": answer,
    }
    return item | changes


HITOM = [
    hitom_item(0, "Where is the pear really?", "tin"),
    hitom_item(1, "Where does Ida really think the pear is?", "red_box"),
    hitom_item(1, "Where does Jo really think the pear is?", "tin", prompting_type="CoTP", story=_TOLD),
    hitom_item(0, "Where is the pear really?", "tin", story=_TOLD, choices="A. tin, B. blue_bag, C. red_box"),
    hitom_item(2, "Where does Jo think Ida thinks the pear is?", "red_box"),
    hitom_item(3, "Where does Jo think Ida thinks Kai thinks the pear is?", "red_box"),
]
_TOMI_STORY = (
    "1 Mo entered the barn.\n2 Mo likes the plum\n3 The cup is in the sack.\n4 Mo exited the barn.\n"
    "5 Ned moved the cup to the old_jar.\n"
)
_TOMI_ASKS = (
    ("Where was the cup at the beginning?", "sack"),
    ("Where will Mo look for the cup?", "sack"),
    ("Where will Ned look for the cup?", "old_jar"),
    ("Where does Ned think that Mo searches for the cup?", "sack"),
    ("Where is the cup really?", "old_jar"),
)
TOMI = "".join(f"{_TOMI_STORY}6 {ask}\t{answer}\t1\n" for ask, answer in _TOMI_ASKS)


def tombench_item(ability, question, frage, options, letter, twins=None, **changes):
    nan = float("nan")
    full = [*options, nan, nan][:4]
    chinese = [*(twins or options), nan, nan][:4]
    return {
        "能力\nABILITY": ability,
        "序号\nINDEX": 1,
        "故事": "李明把杯子放进箱子。",
        "问题": frage,
        **{f"选项{key}": value for key, value in zip("ABCD", chinese)},
        "STORY": "Li Ming puts the cup in the crate. An Na moves it to the tub.",
        "QUESTION": question,
        **{f"OPTION-{key}": value for key, value in zip("ABCD", full)},
        "答案\nANSWER": letter,
    } | changes


_LOCATION = "Belief: Location false beliefs"
_TWO, _ZWEI = ["Tub", "Crate"], ["盆", "箱"]
TOMBENCH = [
    tombench_item(_LOCATION, "Where is the cup now?", "现在杯子在哪里？", _TWO, "A", _ZWEI),
    tombench_item(_LOCATION, "Where is the cup before?", "之前杯子在哪里？", ["A. Tub", "B. Crate"], "B"),
    # Translated otherwise than above; the Chinese options are the same.
    tombench_item(
        _LOCATION, "Where does An Na look for the cup?", "安娜会在哪里找？", ["Vat", "Crate"], "A", _ZWEI
    ),
    tombench_item(_LOCATION, "Where does Li Ming look for the cup?", "李明会在哪里找？", _TWO, "B", _ZWEI),
    tombench_item(
        f"{_LOCATION} Belief: Second-order beliefs",
        "Where does An Na think Li Ming looks for the cup?",
        "安娜认为李明会在哪里找？",
        ["Tub", "Crate", "Sack", "Box"],
        "B",
    ),
    tombench_item(
        "Emotion: Moral emotions", "How is Li Ming?", "李明感觉如何？", ["Glad", "Sad"], "A", STORY="A gift."
    ),
]
CONTENTS = {
    "txt": 'A CX of S1 stands here. Its label says "S2". XPRO is new, and so is XNAM.',
    "txt_correctlabel": 'A CX of S1 stands here. Its label says "S1". XNAM comes.',
    "o1": "rice",
    "o2": "sweet corn",
    "c": "tin",
    "xnam": "Uma",
    "xpro": "she",
    "obj_pro": "her",
    "pos_pro": "her",
    "NUMBER": 0,
}
TRANSFER = {
    "txt": "Eli puts the hat in the old trunk. Fay moves it from the old trunk to the trunk.",
    "txt_notransfer": "Eli puts the hat in the old trunk. Fay looks at it.",
    "txt_informed": "Fay tells Eli of it.",
    "txt_present": "Eli puts the hat in the old trunk and watches Fay move it to the trunk.",
    "o1": "trunk",
    "o2": "old trunk",
    "q1": "The hat falls out of the",
    "q2": "Eli will look for the hat in the",
}


@pytest.fixture
def files(tmp_path):
    """A right file of each layout."""
    paths = {
        name: tmp_path / f"{name}.{end}"
        for name, end in (
            ("bigtom", "csv"),
            ("hitom", "json"),
            ("tomi", "txt"),
            ("tombench", "jsonl"),
            ("paper", "py"),
        )
    }
    paths["bigtom"].write_text("\n".join([";".join(BIGTOM)] * 2) + "\n")
    paths["hitom"].write_text(json.dumps({"data": HITOM}))
    paths["tomi"].write_text(TOMI)
    lines = [json.dumps(item, ensure_ascii=False) for item in TOMBENCH]
    paths["tombench"].write_text("\n".join(lines), encoding="utf-8")
    paths["paper"].write_text(f"import os\ntsks1 = [{CONTENTS!r}]\ntsks2 = [{TRANSFER!r}]\ntsks3 = []\n")
    return paths


def about(stories):
    return [(q.category, q.order, q.agents, q.answer) for story in stories for q in story.questions]


def test_bigtom(files):
    stories = tt.read_benchmark(files["bigtom"], "bigtom")
    assert len(stories) == 20
    assert [story.group for story in stories] == ["bigtom-0000"] * 10 + ["bigtom-0001"] * 10
    by = {(story.scenario, story.condition): story for story in stories[:10]}
    calm = "Lea bakes rolls. Lea wants them soft. Lea sets the oven low. Lea believes the oven is low."
    low, high = BIGTOM[11], BIGTOM[8]
    expected = {
        ("forward_belief", "true_belief"): (f"{BIGTOM[0]} Lea watches the child.", high, "true_belief"),
        ("forward_belief", "false_belief"): (
            f"{BIGTOM[0]} Lea does not watch the child.",
            low,
            "false_belief",
        ),
        ("forward_belief", "true_control"): (f"{calm} {BIGTOM[14]} Lea watches the cat.", low, "true_belief"),
        ("forward_belief", "false_control"): (f"{calm} {BIGTOM[14]} {BIGTOM[16]}", low, "true_belief"),
        ("forward_action", "true_belief"): (f"{BIGTOM[0]} {BIGTOM[1]}", BIGTOM[10], "true_belief"),
        ("forward_action", "false_belief"): (f"{BIGTOM[0]} {BIGTOM[2]}", BIGTOM[13], "false_belief"),
        ("forward_action", "true_control"): (f"{calm} {BIGTOM[14]} {BIGTOM[15]}", BIGTOM[13], "true_belief"),
        ("forward_action", "false_control"): (f"{calm} {BIGTOM[14]} {BIGTOM[16]}", BIGTOM[13], "true_belief"),
        ("backward_belief", "true_belief"): (f"{BIGTOM[0]} Lea turns the oven down.", high, "true_belief"),
        ("backward_belief", "false_belief"): (f"{BIGTOM[0]} Lea waits for an hour.", low, "false_belief"),
    }
    found = {}
    for key, story in by.items():
        (question,) = story.questions
        found[key] = (story.text, question.answer, question.category)
        assert question.agents == ("Lea",)
        assert set(question.options) in ({low, high}, {BIGTOM[10], BIGTOM[13]})
    assert found == expected
    (question,) = by["forward_action", "true_belief"].questions
    assert question.text == "Question: What will Lea do? Answer:"


def test_hitom(files):
    (story,) = tt.read_benchmark(files["hitom"], "hitom")
    assert story.text.startswith("Ida, Jo and Kai entered the den. The pear is in the red_box. Ida")
    assert (story.scenario, story.condition) == ("length_1", "no_deception")
    assert about([story]) == [
        ("reality", 0, (), "tin"),
        ("false_belief", 1, ("Ida",), "red_box"),
        ("true_belief", 1, ("Jo",), "tin"),
        ("second_order", 2, ("Jo", "Ida"), "red_box"),
        ("second_order", 3, ("Jo", "Ida", "Kai"), "red_box"),
    ]
    assert story.questions[0].options == ("red_box", "tin", "blue_bag")


def test_tomi(files):
    (story,) = tt.read_benchmark(files["tomi"], "tomi")
    assert story.text == (
        "Mo entered the barn. Mo likes the plum. The cup is in the sack. Mo exited the barn. "
        "Ned moved the cup to the old_jar."
    )
    assert about([story]) == [
        ("memory", 0, (), "sack"),
        ("false_belief", 1, ("Mo",), "sack"),
        ("true_belief", 1, ("Ned",), "old_jar"),
        ("second_order", 2, ("Ned", "Mo"), "sack"),
        ("reality", 0, (), "old_jar"),
    ]
    assert all(set(question.options) == {"sack", "old_jar"} for question in story.questions)
    assert story.condition == "false_belief"
    trace = files["tomi"].with_suffix(".trace")
    trace.write_text("enter_agent_0,memory,second_order_false_belief\n" * 5)
    (story,) = tt.read_benchmark(files["tomi"], "tomi")
    assert story.condition == "second_order_false_belief"
    trace.write_text("enter_agent_0,memory,true_belief\n")
    with pytest.raises(TomsparseError, match=r"tomi.trace has 1 lines for 5 questions"):
        tt.read_benchmark(files["tomi"], "tomi")


def test_tombench(files):
    stories = tt.read_benchmark(files["tombench"], "tombench")
    assert about(stories) == [
        ("reality", 0, (), "Tub"),
        ("memory", 0, (), "Crate"),
        ("true_belief", 1, ("An Na",), "Vat"),
        ("false_belief", 1, ("Li Ming",), "Crate"),
        ("second_order", 2, ("An Na", "Li Ming"), "Crate"),
        ("other", 0, (), "Glad"),
    ]
    assert [story.condition for story in stories] == [_LOCATION, "Emotion: Moral emotions"]
    chinese = tt.read_benchmark(files["tombench"], "tombench", language="zh")
    # One Chinese text for both stories here, so they are one.
    assert [row[0] for row in about(chinese)] == [row[0] for row in about(stories)]
    assert chinese[0].questions[0].text == "问题： 现在杯子在哪里？ 答案："
    assert chinese[0].questions[0].answer == "盆"


def test_options_that_are_written_alike(files):
    ask = ("Where is the cup now?", "现在杯子在哪里？")
    lines = [
        tombench_item(_LOCATION, *ask, ["Tub", "Crate", "Crate"], "A"),
        tombench_item(_LOCATION, *ask, ["Tub", "Crate", "Tub"], "A"),
    ]
    files["tombench"].write_text("\n".join(map(json.dumps, lines)))
    with pytest.warns(
        UserWarning, match="1 questions have an option that is equal to the answer, first at line 2"
    ):
        (story,) = tt.read_benchmark(files["tombench"], "tombench")
    assert [question.options for question in story.questions] == [("Tub", "Crate")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (story,) = tt.read_benchmark(files["tombench"], "tombench", answers="letter")
    assert [question.options for question in story.questions] == [("A", "B", "C")] * 2


def test_paper_tasks(files, tmp_path):
    stories = tt.read_benchmark(files["paper"], "paper")
    assert len(stories) == 16
    assert {story.group for story in stories} == {"paper-contents-00", "paper-transfer-00"}
    answers = {story.id[6:]: tuple(question.answer for question in story.questions) for story in stories}
    assert answers == {
        "contents-00-false_belief-0": ("rice", "sweet corn"),
        "contents-00-false_belief-1": ("sweet corn", "rice"),
        **{f"contents-00-{c}-0": ("rice",) * 2 for c in ("correct_label", "informed", "open_container")},
        **{
            f"contents-00-{c}-1": ("sweet corn",) * 2 for c in ("correct_label", "informed", "open_container")
        },
        "transfer-00-false_belief-0": ("trunk", "old trunk"),
        "transfer-00-false_belief-1": ("old trunk", "trunk"),
        "transfer-00-no_transfer-0": ("old trunk", "old trunk"),
        "transfer-00-no_transfer-1": ("trunk", "trunk"),
        **{f"transfer-00-{c}-0": ("trunk",) * 2 for c in ("informed", "present")},
        **{f"transfer-00-{c}-1": ("old trunk",) * 2 for c in ("informed", "present")},
    }
    for story in stories:
        expected = "false_belief" if story.condition == "false_belief" else "true_belief"
        assert [question.category for question in story.questions] == ["reality", expected]
    by_id = {story.id[6:]: story for story in stories}
    contents = by_id["contents-00-false_belief-0"]
    assert contents.text.startswith(
        'A tin of rice stands here. Its label says "sweet corn". She is new, and so is Uma. Uma reads'
    )
    assert contents.agents == ("Uma",)
    swapped = by_id["transfer-00-false_belief-1"]
    assert swapped.text == "Eli puts the hat in the trunk. Fay moves it from the trunk to the old trunk."
    assert by_id["transfer-00-informed-0"].text.endswith("to the trunk. Fay tells Eli of it.")
    assert swapped.agents == ("Eli",)
    as_json = tmp_path / "tasks.json"
    as_json.write_text(json.dumps({"s1": [CONTENTS], "s2": [TRANSFER], "s3": []}))
    assert tt.read_benchmark(as_json, "paper") == stories


def test_letters(files):
    for name in ("bigtom", "hitom", "tombench"):
        by_text = tt.read_benchmark(files[name], name)
        by_letter = tt.read_benchmark(files[name], name, answers="letter")
        for story, other in zip(by_text, by_letter):
            assert (story.id, story.text) == (other.id, other.text)
            for question, asked in zip(story.questions, other.questions):
                listed = asked.text.split("\n")
                place = asked.options.index(asked.answer)
                assert question.category == asked.category
                assert listed[-1] == "Answer:"
                assert listed[1 + place] == f"{asked.answer}. {question.answer}"
                assert len(listed) == 2 + len(question.options)


def test_they_are_scored_and_sampled_like_generated_stories(files):
    model = tt.load_model(tiny.long_directory(), device="cpu")
    for name, path in files.items():
        stories = tt.read_benchmark(path, name)
        scores = tt.score_stories(model, stories, show_progress=False)
        by = scores.accuracy(["condition"])
        assert by.n.sum() == sum(len(story.questions) for story in stories)
        assert set(by.category) == {row[0] for row in about(stories)}
        samples = tt.story_samples(model, stories)
        assert len(samples) == sum(row[0] == "false_belief" for row in about(stories))
        assert scores.frame.group.nunique() == len({story.group or story.id for story in stories})


def test_a_sweep_and_an_effect_take_them(files):
    model = tt.load_model(tiny.long_directory(), device="cpu")
    samples = tt.story_samples(model, [tiny.story(i) for i in range(3)])
    general = tt.text_samples(model, tt.generate_texts(8), n=4, length=32)
    tom, other = (tt.fisher_diagonal(model, some, show_progress=False) for some in (samples, general))
    dev = [s for name in files for s in tt.read_benchmark(files[name], name, split="dev")]
    sweep = tt.kappa_sweep(
        model, tom, other, dev_stories=dev, dev_text=general, kappas=(0.1,), n_random=1, show_progress=False
    )
    assert sweep.n["other"] == 1
    assert sweep.frame.other.notna().all()
    test = [s for name in files for s in tt.read_benchmark(files[name], name)]
    masks = tt.arm_masks(tom, other, 0.1)
    found = tt.effect(model, masks, stories=test, text=general, n_random=1, n_draws=50, show_progress=False)
    before = found.accuracy[found.accuracy.arm == "before"].set_index("measure")
    scores = tt.score_stories(model, test, show_progress=False)
    for row in scores.accuracy().itertuples():
        assert (before.n[row.category], before.accuracy[row.category]) == (row.n, row.accuracy)
    tt.plot.accuracy(found)
    with pytest.raises(TomsparseError, match="split 'dev'"):
        tt.effect(model, masks, stories=dev, text=general, n_random=1)


def test_options_that_are_sentences_are_scored_exactly(files):
    model = tt.load_model(tiny.long_directory(), device="cpu", dtype=torch.float64)
    hf, tokenizer = tiny.hf_model(), tiny.build_tokenizer()
    stories = tt.read_benchmark(files["bigtom"], "bigtom")[:10]
    for normalise in ("none", "tokens"):
        for pack in (False, True):
            prepared = prepare_scoring(model, stories, normalise=normalise, pack=pack)
            expected = []
            for story, options in zip(stories, prepared.options):
                prompt = [1, *tokenizer(story.prompt(story.questions[0]))["input_ids"]]
                scores = []
                for option in options:
                    answer = tokenizer(f" {option}")["input_ids"]
                    log_probs = oracles.logits(hf, torch.tensor(prompt + answer)).log_softmax(-1)
                    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
                    total = sum(float(log_probs[place, token]) for place, token in zip(places, answer))
                    scores.append(total / (len(answer) if normalise == "tokens" else 1))
                    assert len(answer) > 8
                expected.append(scores)
            # transformers computes softmax and norms in float32 whatever the weights are.
            np.testing.assert_allclose(prepared.option_scores(model), expected, rtol=1e-7)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("bigtom", lambda text: text.replace(";", ","), r"line 1: 1 fields separated by ';'"),
        ("bigtom", lambda text: text.replace("What will Lea do?", ""), r"line 1: field 8 is empty"),
        ("bigtom", lambda text: text.replace(BIGTOM[11], BIGTOM[8]), r"line 1: both answers to"),
        ("bigtom", lambda text: text.replace("Does Lea believe", "Is it"), r"does not begin 'Does"),
        ("hitom", lambda text: text[:-3], r"line 1: not JSON"),
        ("hitom", lambda text: "{}", r"no list of questions under 'data'"),
        ("hitom", lambda text: text.replace('"answer": "tin"', '"answer": "hat"'), r"item 1: .*'hat'"),
        ("hitom", lambda text: text.replace('"question_order": 1', '"question_order": "1"'), r"item 2: no"),
        ("hitom", lambda text: text.replace("choices", "options"), r"item 1: no choices"),
        ("hitom", lambda text: text.replace("does Ida really", "do they"), r"names 0 agents at order 1"),
        ("hitom", lambda text: text.replace("pear really", "hat really"), r"order 0 about 'pear'"),
        ("tomi", lambda text: "Once\n" + text, r"line 1: 'Once' does not begin with a number"),
        ("tomi", lambda text: text.replace("2 Mo", "7 Mo", 1), r"line 2: number 7 where 2 follows"),
        ("tomi", lambda text: text + "1 Mo entered the barn.\n", r"line 31: the last story has no question"),
        ("tomi", lambda text: text.replace("\tsack", "\that"), r"line 6: the answer 'hat'"),
        ("tomi", lambda text: text.replace("really", "now"), r"line 30: a question of unknown wording"),
        ("tombench", lambda text: "[]", r"line 1: a list, not a question"),
        ("tombench", lambda text: text.replace("QUESTION", "ASK"), r"line 1: no QUESTION"),
        ("tombench", lambda text: text.replace('ANSWER": "A"', 'ANSWER": "C"'), r"'C' is not one of A, B"),
        ("paper", lambda text: text.replace("tsks2", "others"), r"no list 's2'"),
        ("paper", lambda text: text.replace("'o1': 'rice'", "'o1': print()"), r"neither literal Python"),
        ("paper", lambda text: text.replace("'q2'", "'q3'"), r"transfer item 0: no text q2"),
        ("paper", lambda text: text.replace("'sweet corn'", "'rice'"), r"o1 and o2 are both 'rice'"),
        ("tomi", lambda text: "", r"has no question"),
    ],
)  # fmt: skip
def test_another_layout_is_refused(files, name, spoil, message):
    path = files[name]
    path.write_text(spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(TomsparseError, match=message) as error:
        tt.read_benchmark(path, name)
    assert str(path) in str(error.value)


def test_options_outside_the_choices_are_refused(files):
    with pytest.raises(TomsparseError, match="benchmark='bigtoms' is not one of 'bigtom'"):
        tt.read_benchmark(files["bigtom"], "bigtoms")
    with pytest.raises(TomsparseError, match="'tomi' is not multiple choice"):
        tt.read_benchmark(files["tomi"], "tomi", answers="letter")
    with pytest.raises(TomsparseError, match="'hitom' is in English"):
        tt.read_benchmark(files["hitom"], "hitom", language="zh")
    with pytest.raises(TomsparseError, match="split='all'"):
        tt.read_benchmark(files["hitom"], "hitom", split="all")
    with pytest.raises(FileNotFoundError):
        tt.read_benchmark("nowhere.csv", "bigtom")
    files["bigtom"].write_bytes(b"caf\xe9;x\n")
    with pytest.raises(TomsparseError, match="not UTF-8"):
        tt.read_benchmark(files["bigtom"], "bigtom")
