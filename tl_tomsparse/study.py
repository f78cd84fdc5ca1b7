"""The experiment with every control in one call: what is measured, what it supports, and where the paper
stands.

    sensitivities   the task; other tasks, other labels, other stories; parts of the task's stories
    kappa           chosen on dev stories
    arms            the mask, its controls, random masks of every kind, operators, doses, rescue, training
    loss            true change against the diagonal's and second-order predictions
    claims          one family, Holm-adjusted
    heads           knock-outs of whole heads; claims of their own
    battery         key-value recall and induction by distance, two kinds of text; claims of their own

Everything finished is in the folder as soon as it is finished, and a study that was stopped, however, goes on
there. Sensitivities come from stories of the split "train", kappa from "dev", and what is reported from
"test". The stories are generated, or your own.

NOT claimed: that stories which one generator made stand for stories in general; that what does not show with
this many stories is not there (see the intervals).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from tl_tomsparse._checks import TomsparseError, check_positive
from tl_tomsparse._folder import (
    check_folder,
    claim_folder,
    opened_folder,
    read_points,
    stored_points,
    versions,
)
from tl_tomsparse._model import view
from tl_tomsparse._points import Point
from tl_tomsparse._progress import teller
from tl_tomsparse._study_answers import Answers, collect_answers
from tl_tomsparse._study_arms import matches_for
from tl_tomsparse._study_battery import BatterySection, study_battery
from tl_tomsparse._study_claims import Evidence, StudyClaim, claims_of
from tl_tomsparse._study_compare import Comparer
from tl_tomsparse._study_cost import cost
from tl_tomsparse._study_files import read_parts, write_study
from tl_tomsparse._study_heads import HeadSection, study_heads
from tl_tomsparse._study_material import (
    OTHER_LABELS,
    OTHER_TASKS,
    Material,
    make_material,
    make_sensitivities,
    read_sensitivities,
)
from tl_tomsparse._study_measure import (
    choose,
    loss_changes,
    mask_overlaps,
    masks_to_predict,
    measure,
    study_meter,
)
from tl_tomsparse._study_processes import Helpers, check_load, make_job, make_work, others_points
from tl_tomsparse._study_settings import StudySettings
from tl_tomsparse._study_stories import check_own, digest_of, settings_of
from tl_tomsparse.effect import assemble
from tl_tomsparse.loss_change import LossChange
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.sensitivity import Sensitivity
from tl_tomsparse.stories import Story

if TYPE_CHECKING:
    import pandas as pd

CONTROLS = ("general_only", "lowest", *OTHER_TASKS, *OTHER_LABELS)


@dataclass(frozen=True, eq=False)
class Study:
    """A finished study.

    Attributes:
        claims: what it supports, with evidence and where the paper stands.
        arms: one row an arm: family, seed, dose, n_weights, an accuracy for each measure, perplexity.
        accuracy: one row a family and measure: family, arms, measure, n, accuracy (mean over arms), low, high
            (exact binomial 95 % for a single arm, extremes for several), chance.
        comparisons: one row a family and measure: what the mask does beyond it, value (change of accuracy),
            low, high (bootstrap 95 % by group), p; for family "before" the change itself.
        overlaps: one row a pair of masks: a, b, share (of the stories, for each), common, size_a,
            size_b, jaccard, expected_jaccard (random masks), p.
        losses: one row an edit and term of [`LossChange`][]: edit, seed, term, mean, low, high (nats).
        masks: the mask and its controls, by name.
        heads: the same question for whole heads: claims of their own family, figures and frames by title.
        battery: finding things again by distance, and two kinds of text: claims of their own family, scores
            and changes.
        answers: which arm has which question right, and what text costs it; what the tables are made of.
        kappa: of all of them.
        facts: the model's identity, settings, versions, and how much of what was measured.
    """

    claims: list[StudyClaim]
    arms: pd.DataFrame = field(repr=False)
    accuracy: pd.DataFrame = field(repr=False)
    comparisons: pd.DataFrame = field(repr=False)
    overlaps: pd.DataFrame = field(repr=False)
    losses: pd.DataFrame = field(repr=False)
    masks: Mapping[str, SparseMask] = field(repr=False)
    heads: HeadSection = field(repr=False)
    battery: BatterySection = field(repr=False)
    answers: Answers = field(repr=False)
    kappa: float
    facts: dict[str, Any] = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """The claims: claim, status, value, low, high, p, paper, sentence."""
        import pandas as pd

        columns = ["claim", "status", "value", "low", "high", "p", "paper", "sentence"]
        return pd.DataFrame([claim.to_dict() for claim in self.claims])[columns]

    def __repr__(self) -> str:
        """One line: how many claims of which status."""
        found = self.to_frame().status.value_counts()
        counts = ", ".join(f"{n} {status}" for status, n in found.items())
        return f"Study(kappa={self.kappa:g}, {len(self.masks['mask'])} weights, claims: {counts})"


def study(
    model: Any,
    folder: str | Path,
    settings: StudySettings | None = None,
    *,
    stories: Mapping[str, Sequence[Story]] | None = None,
    processes: int = 1,
    load: Callable[[], Any] | None = None,
    progress: Callable[[str], None] | None = None,
    show_progress: bool = True,
) -> Study:
    """Run everything that is not yet in the folder, and write the page `study.html`.

    Args:
        model: unedited, in eval mode, with its own (not folded) weights.
        folder: where; new, empty, or of the same study.
        settings: what to do.
        stories: your own in place of generated ones, all of them used: {"train": ..., "dev": ..., "test":
            ...}, for example of `read_benchmark` or `read_jsonl`. The numbers of stories in the settings are
            then theirs. Controls that these stories do not ask about, and those of generated kinds
            (transfer, contents, other stories, other wordings), are left out, and claims about them are "not
            testable".
        processes: how many work side by side, this one among them; each further one loads the model.
        load: gives the same model in another process, such as `functools.partial(load_model, path)`; needed
            for several processes. A script needs `if __name__ == "__main__":` then.
        progress: told what begins; by default it is written beside the progress bars, where these are shown.
        show_progress: show progress bars.

    Raises:
        TomsparseError: settings that cannot be met; stories without a false-belief question in each split,
            in fewer than eight groups of train, of the wrong split, or with an id, a group or a text in two
            splits; several processes without `load`, or with one that cannot be sent to them; a folder of
            another study; a model that cannot be used, or that has an active edit; a full disk.
    """
    from tl_tomsparse.study_report import write_study_page

    settings = StudySettings() if settings is None else settings
    own = None if stories is None else check_own(stories)
    if own is not None:
        settings = settings_of(own, settings)
    settings.check()
    check_positive("processes", processes)
    if processes > 1 and load is None:
        raise TomsparseError(
            f"processes={processes} needs load=, a function that gives the same model in another process, "
            "such as functools.partial(load_model, path)."
        )
    if processes > 1:
        check_load(load)
    out = Path(folder)
    plain = settings.plain()
    if own is not None:
        plain["own_stories"] = digest_of(own)
    check_folder(out, plain)
    seen = view(model)
    seen.require_eval()
    seen.require_raw_basis()
    if seen.active_edits:
        raise TomsparseError(
            f"{seen.name} has an active edit, {seen.active_edits[-1]}; leave its `with` block before a study."
        )
    seen.keys(settings.matrices)
    progress = teller(progress, show_progress)
    progress("Making stories and texts")
    material = make_material(model, settings, own)
    progress(cost(model, material, settings))
    with opened_folder(out):
        facts: dict[str, Any] = claim_folder(
            out,
            {
                "settings": plain,
                "command": "study",
                "identity": seen.identity().to_dict(),
                "samples": material.digest,
                "device": str(seen.device),
                "versions": versions(),
            },
        )
        with ExitStack() as stack:
            helpers = None
            if load is not None and processes > 1:
                job = make_job(load, settings, out, seen.identity().fingerprint, material.digest, own)
                helpers = stack.enter_context(Helpers(job, processes, show_progress))
                progress(f"Sensitivities to {len(material.tasks)} sets of samples, in {processes} processes")
                helpers.sensitivities(model, material)
            make_sensitivities(
                model, material, material.tasks, settings, out, progress=progress, show_progress=show_progress
            )
            sensitivities = read_sensitivities(material, out)
            finished, store = stack.enter_context(stored_points(out / "points.jsonl"))
            bars: dict[str, Any] = {"on_point": store, "resume": finished, "show_progress": show_progress}
            if settings.kappa is None:
                choice = choose(model, material, sensitivities, settings, progress, bars)
                kappa, facts["kappa_reason"] = choice.kappa, choice.reason
            else:
                kappa, facts["kappa_reason"] = settings.kappa, "Kappa was given, not chosen here."
            work = make_work(model, sensitivities, kappa, settings)
            masks = work.masks
            if helpers is not None:
                progress(f"Edits, training and predictions, in {processes} processes")
                meter = study_meter(model, material, store, [*finished, *others_points(out)])
                helpers.edits(model, material, work, meter)
                finished = read_points(out / "points.jsonl")
            meter = study_meter(model, material, store, [*finished, *others_points(out)])
            points, rows = measure(
                model, material, work.arms, meter, masks["mask"], settings, out, progress, show_progress
            )
        progress("Predicted and true changes of the loss")
        predicted = tqdm(
            masks_to_predict(masks["mask"], settings), desc="loss changes", disable=not show_progress
        )
        losses = loss_changes(model, material, predicted, sensitivities["task"], out)
        progress("Heads by knock-outs")
        heads = study_heads(model, masks["mask"], settings, own, out, show_progress)
        progress("Finding things again by distance, and two kinds of text")
        battery = study_battery(model, masks, settings, out, show_progress)
        result = _assemble(
            model,
            material,
            points,
            rows,
            masks,
            sensitivities,
            losses,
            heads,
            battery,
            kappa,
            settings,
            facts,
        )
        progress("Writing the page")
        write_study(out, result)
        write_study_page(out / "study.html", result)
    return result


def read_study(folder: str | Path) -> Study:
    """A finished study as it was, without its model and without running anything again.

    Args:
        folder: that [`study`][] or `tomsparse run --study` wrote it to.

    Raises:
        TomsparseError: no folder, no study in it, a study that is not finished, or files of another one.
    """
    return Study(**read_parts(Path(folder)))


def _assemble(
    model: Any,
    material: Material,
    points: Mapping[str, list[Point]],
    rows: list[dict[str, Any]],
    masks: Mapping[str, SparseMask],
    sensitivities: Mapping[str, Sensitivity],
    losses: Mapping[tuple[str, int | None], LossChange],
    heads: HeadSection,
    battery: BatterySection,
    kappa: float,
    settings: StudySettings,
    facts: dict[str, Any],
) -> Study:
    """Tables and claims from what was measured."""
    import pandas as pd

    families = [row["family"] for row in rows]
    answers = collect_answers(material.scoring, material.text, material.prompts, points, families)
    compare = Comparer(answers, n_draws=settings.n_draws, seed=settings.seed)
    taken: dict[str, int] = {}
    for row in rows:
        at = taken.get(row["family"], 0)
        taken[row["family"]] = at + 1
        row |= {name: compare.accuracy(row["family"], name)[at] for name in compare.measures.names}
        row["perplexity"] = compare.perplexity(row["family"])[at]
    sizes = {row["family"]: row["n_weights"] for row in rows}
    as_effect = {"before": points["before"], "mask": points["mask"], "random": points["random_matrix"]}
    n_weights = dict.fromkeys(("mask", "random"), sizes["mask"]) | {"before": 0}
    meta = {
        "kappa": kappa,
        "operator": "mean",
        "n_random": settings.random_masks,
        "seed": settings.seed,
        "accuracy_margin": settings.accuracy_margin,
        "perplexity_margin": settings.perplexity_margin,
        "n_draws": settings.n_draws,
        "prepend_bos": settings.prepend_bos,
    }
    found = assemble(material.scoring, material.text, as_effect, n_weights, meta)
    overlaps, told = mask_overlaps(masks, sensitivities, kappa)
    random = tuple(f"random_{match}" for match in matches_for(model, masks["mask"]) if match != "matrix")
    evidence = Evidence(
        found,
        compare,
        told,
        losses["mask", None],
        material.answer_groups,
        CONTROLS,
        random,
        sizes,
        settings.n_draws,
        settings.seed,
        material.left_out,
    )
    chance = found.accuracy[found.accuracy.arm == "before"].set_index("measure").chance.to_dict()
    facts = facts | {
        "kappa": kappa,
        "n_stories": compare.measures.n_stories,
        "n_groups": compare.measures.n_groups,
        "n_questions": len(material.scoring.questions),
        "n_arms": len(rows),
    }
    return Study(
        claims_of(evidence),
        pd.DataFrame(rows).astype({"seed": "Int64"}),
        compare.table(chance),
        _comparisons(compare),
        pd.DataFrame(overlaps),
        pd.concat(
            [change.to_frame().assign(edit=family, seed=seed) for (family, seed), change in losses.items()],
            ignore_index=True,
        ).astype({"seed": "Int64"}),
        masks,
        heads,
        battery,
        answers,
        kappa,
        facts,
    )


def _comparisons(compare: Comparer) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for family in compare.families:
        if family == "mask":
            continue
        for name in compare.measures.names:
            found = compare.change("mask", family, name)
            row = {"family": family, "measure": name, "value": found.value}
            rows.append({**row, "low": found.low, "high": found.high, "p": found.p_differs()})
    return pd.DataFrame(rows)
