"""The experiment with every control in one call: what is measured, what it supports, and where the paper
stands.

    sensitivities   the task; other tasks, other labels, other stories; parts of the task's stories
    kappa           chosen on dev stories
    arms            the mask, its controls, random masks of every kind, operators, doses, rescue, training
    loss            true change against the diagonal's and second-order predictions
    claims          one family, Holm-adjusted

Everything finished is in the folder as soon as it is finished, and a study that was stopped, however, goes on
there. Sensitivities come from stories of the split "train", kappa from "dev", and what is reported from
"test".

NOT claimed: that stories which one generator made stand for stories in general; that what does not show with
this many stories is not there (see the intervals).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_tomsparse._artifacts import (
    write_bytes,
    write_json,
)
from tl_tomsparse._checks import TomsparseError, check_choice, check_kappa, check_positive
from tl_tomsparse._folder import check_folder, claim_folder, opened_folder, stored_points, versions
from tl_tomsparse._material import read_text
from tl_tomsparse._model import MATRICES, view
from tl_tomsparse._points import Point
from tl_tomsparse._study_arms import matches_for
from tl_tomsparse._study_claims import Evidence, StudyClaim, claims_of
from tl_tomsparse._study_compare import Comparer
from tl_tomsparse._study_heads import HeadSection, study_heads
from tl_tomsparse._study_material import (
    CHUNKS,
    OTHER_LABELS,
    OTHER_TASKS,
    Material,
    make_masks,
    make_material,
    make_sensitivities,
)
from tl_tomsparse._study_measure import choose, loss_changes, mask_overlaps, measure
from tl_tomsparse._study_processes import measure_in_processes, others_points
from tl_tomsparse.effect import assemble
from tl_tomsparse.loss_change import LossChange
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.sensitivity import Sensitivity

if TYPE_CHECKING:
    import pandas as pd

CONTROLS = ("general_only", "lowest", *OTHER_TASKS, *OTHER_LABELS)


@dataclass(frozen=True)
class StudySettings:
    """What a study is asked for.

    Attributes:
        stories: train stories of each sensitivity.
        dev_stories: stories on which kappa is chosen.
        test_stories: held-out stories; a quarter as many photographs and half of that key-value facts join
            them.
        windows: text windows of the general sensitivity; a quarter as many (at least 10) for perplexity.
        length: tokens of a window.
        text: files of real text, cut into three parts; none for generated text.
        kappa: sparsity of all masks; None chooses it on dev stories.
        matrices: which weights.
        random_masks: random masks of each kind; a claim needs at least 19.
        tune_steps: updates when masked weights are trained.
        head_stories: stories on which heads are found, and as many on which they are measured; 0 leaves heads
            out.
        seed: of everything.
        prepend_bos: begin every sample with the BOS token.
        accuracy_margin, perplexity_margin: what counts as no change.
        n_draws: how often groups of stories are drawn again.
    """

    stories: int = 200
    dev_stories: int = 36
    test_stories: int = 240
    windows: int = 200
    length: int = 128
    text: tuple[str, ...] = ()
    kappa: float | None = None
    matrices: tuple[str, ...] = ("Q", "K")
    random_masks: int = 20
    tune_steps: int = 100
    head_stories: int = 6
    seed: int = 0
    prepend_bos: bool = True
    accuracy_margin: float = 0.05
    perplexity_margin: float = 0.05
    n_draws: int = 10_000

    def quick(self) -> StudySettings:
        """A smaller one, for a first look: fewer stories, and random masks as few as a claim allows."""
        return replace(
            self,
            stories=64,
            dev_stories=12,
            test_stories=48,
            windows=60,
            random_masks=19,
            tune_steps=20,
            head_stories=3,
        )

    def check(self) -> None:
        """Refuse what can be refused before any work.

        Raises:
            TomsparseError: a count below one, an unknown matrix, a kappa outside (0, 1].
        """
        for name in ("stories", "dev_stories", "test_stories", "windows", "random_masks", "tune_steps"):
            check_positive(name, getattr(self, name))
        check_positive("n_draws", self.n_draws)
        if self.head_stories < 0:
            raise TomsparseError(f"head_stories={self.head_stories!r} must be 0 or more.")
        for matrix in self.matrices:
            check_choice("matrices", matrix, MATRICES)
        if not self.matrices:
            raise TomsparseError("No matrices were asked for; name at least one, for example Q,K.")
        if self.stories < 2 * CHUNKS:
            raise TomsparseError(
                f"stories={self.stories} must be at least {2 * CHUNKS}: they are divided into {CHUNKS} parts."
            )
        if self.kappa is not None:
            check_kappa(self.kappa)
            if not self.kappa:
                raise TomsparseError("kappa=0.0 edits no weight; choose one above 0.")
        for path in self.text:
            read_text(Path(path))


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
        overlaps: one row a pair of masks: a, b, stories (of each), common, size_a, size_b, jaccard,
            expected_jaccard (random masks), p.
        losses: one row an edit and term of [`LossChange`][]: edit, seed, term, mean, low, high (nats).
        masks: the mask and its controls, by name.
        heads: the same question for whole heads: claims of their own family, figures and frames by title.
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
    processes: int = 1,
    load: Callable[[], Any] | None = None,
    progress: Callable[[str], None] = lambda _message: None,
    show_progress: bool = True,
) -> Study:
    """Run everything that is not yet in the folder, and write the page `study.html`.

    Args:
        model: unedited, in eval mode, with its own (not folded) weights.
        folder: where; new, empty, or of the same study.
        settings: what to do.
        processes: how many measure edits side by side; each loads the model.
        load: gives the same model in another process, such as `functools.partial(load_model, path)`; needed
            for several processes. A script needs `if __name__ == "__main__":` then.
        progress: told what begins.
        show_progress: show progress bars.

    Raises:
        TomsparseError: settings that cannot be met, several processes without `load`, a folder of another
            study, a model that cannot be used, a full disk.
    """
    from tl_tomsparse.study_report import write_study_page

    settings = StudySettings() if settings is None else settings
    settings.check()
    check_positive("processes", processes)
    if processes > 1 and load is None:
        raise TomsparseError(
            f"processes={processes} needs load=, a function that gives the same model in another process, "
            "such as functools.partial(load_model, path)."
        )
    out = Path(folder)
    plain = dict(json.loads(json.dumps(asdict(settings))))
    check_folder(out, plain)
    seen = view(model)
    seen.require_eval()
    seen.require_raw_basis()
    progress("Making stories and texts")
    material = make_material(model, settings)
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
        sensitivities = make_sensitivities(
            model, material, settings, out, progress=progress, show_progress=show_progress
        )
        with stored_points(out / "points.jsonl") as (finished, store):
            bars: dict[str, Any] = {"on_point": store, "resume": finished, "show_progress": show_progress}
            kappa = settings.kappa or choose(model, material, sensitivities, settings, progress, bars)
            if load is not None and processes > 1:
                progress(f"Edits on held-out questions, in {processes} processes")
                fingerprint = seen.identity().fingerprint
                measure_in_processes(load, settings, out, kappa, fingerprint, processes)
            bars["resume"] = [*finished, *others_points(out)]
            masks = make_masks(sensitivities, kappa)
            points, rows = measure(
                model, material, masks, sensitivities, kappa, settings, out, progress, bars
            )
        progress("Predicted and true changes of the loss")
        losses = loss_changes(
            model, material, masks["mask"], sensitivities["task"], settings, out, show_progress
        )
        progress("Heads by knock-outs")
        heads = study_heads(model, masks["mask"], settings, out, show_progress)
        result = _assemble(
            model, material, points, rows, masks, sensitivities, losses, heads, kappa, settings, facts
        )
        progress("Writing the page")
        _write(out, result)
        write_study_page(out / "study.html", result)
    return result


def _assemble(
    model: Any,
    material: Material,
    points: Mapping[str, list[Point]],
    rows: list[dict[str, Any]],
    masks: Mapping[str, SparseMask],
    sensitivities: Mapping[str, Sensitivity],
    losses: Mapping[tuple[str, int | None], LossChange],
    heads: HeadSection,
    kappa: float,
    settings: StudySettings,
    facts: dict[str, Any],
) -> Study:
    """Tables and claims from what was measured."""
    import pandas as pd

    compare = Comparer(material.scoring, material.text, points, n_draws=settings.n_draws, seed=settings.seed)
    taken: dict[str, int] = {}
    for row in rows:
        at = taken.get(row["family"], 0)
        taken[row["family"]] = at + 1
        row |= {name: compare.accuracy(row["family"], name)[at] for name in compare.measures.names}
        row["perplexity"] = compare.perplexity(points[row["family"]][at])
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
    overlaps, halves = mask_overlaps(masks, sensitivities, kappa)
    random = tuple(f"random_{match}" for match in matches_for(model, masks["mask"]) if match != "matrix")
    evidence = Evidence(
        found,
        compare,
        halves,
        losses["mask", None],
        material.answer_groups,
        CONTROLS,
        random,
        sizes,
        settings.n_draws,
        settings.seed,
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
        kappa,
        facts,
    )


def _comparisons(compare: Comparer) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for family in compare.points:
        if family == "mask":
            continue
        for name in compare.measures.names:
            found = compare.change("mask", family, name)
            row = {"family": family, "measure": name, "value": found.value}
            rows.append({**row, "low": found.low, "high": found.high, "p": found.p_differs()})
    return pd.DataFrame(rows)


def _write(out: Path, result: Study) -> None:
    for mask_name, mask in result.masks.items():
        mask.save(out / f"mask_{mask_name}.safetensors")
    for table in ("arms", "accuracy", "comparisons", "overlaps", "losses"):
        frame = getattr(result, table)
        write_bytes(out / f"{table}.parquet", frame.to_parquet(index=False))
    claims = [claim.to_dict() for claim in result.claims]
    about_heads = [claim.to_dict() for claim in result.heads.claims]
    write_json(out / "study.json", {**result.facts, "claims": claims, "heads": about_heads})
