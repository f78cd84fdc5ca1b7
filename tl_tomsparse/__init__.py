"""Find, edit and examine the few weights that a capability of a language model hangs on.

The public names, in the order of the pipeline; figures are in `tl_tomsparse.plot`.
"""

from . import plot
from ._checks import TomsparseError
from .battery import Battery, PreparedBattery, battery, prepare_battery
from .comparison import StudyComparison, compare_studies
from .components import ComponentEffects, component_effects, mask_components
from .edit import SparseEdit
from .effect import Effect, effect
from .enrichment import at_frequencies, mask_by_frequency, mask_rank, share_at_frequencies
from .evaluate import Perplexity, StoryScores, perplexity, score_stories
from .experiment import KappaChoice, KappaSweep, arm_masks, choose_kappa, kappa_sweep
from .harness import lm_eval_scores
from .head_protocol import (
    HeadsAndMask,
    PaperProtocol,
    head_tasks,
    heads_and_mask,
    mask_in_heads,
    paper_protocol,
)
from .heads import (
    KnockoutDesign,
    KnockoutMeter,
    Knockouts,
    knockout_design,
    measure_knockouts,
    model_heads,
)
from .localisation import induction_stories, key_value_stories
from .locate import HeadLocation, locate_heads
from .loss_change import LossChange, loss_change
from .mask import SparseMask
from .models import load_model
from .patterns import AttentionPattern, attention_pattern
from .position import Position, PositionEffects, position_effects
from .position_verdict import position_verdict
from .ranking import RankedEntries, rank_entries, top_fraction
from .recovery import HeadEffects, recover_heads
from .rotary import FrequencyNorms, RotaryLayer, RotaryLayout, frequency_norms
from .samples import Samples, story_samples, text_samples
from .self_check import SelfCheck, self_check
from .sensitivity import FisherAccumulator, Sensitivity, fisher_diagonal
from .sink import BosAngles, SinkAttention, bos_angles, sink_attention, sink_shift
from .stories import (
    Question,
    Story,
    from_dataset,
    generate_photographs,
    generate_stories,
    generate_texts,
    read_benchmark,
    read_jsonl,
    relabelled,
    to_dataset,
    write_jsonl,
)
from .study import Study, StudySettings, read_study, study
from .tune import Tuned, tune
from .verdict import Claim, verdict

__version__ = "0.1.0"

__all__ = [
    # models
    "load_model",
    "self_check",
    "SelfCheck",
    # stories and text
    "Story",
    "Question",
    "generate_stories",
    "generate_photographs",
    "generate_texts",
    "read_jsonl",
    "write_jsonl",
    "relabelled",
    "from_dataset",
    "to_dataset",
    "read_benchmark",
    "key_value_stories",
    "induction_stories",
    # samples
    "Samples",
    "story_samples",
    "text_samples",
    # sensitivity
    "FisherAccumulator",
    "Sensitivity",
    "fisher_diagonal",
    # masks
    "SparseMask",
    "RankedEntries",
    "rank_entries",
    "top_fraction",
    # edits
    "SparseEdit",
    "LossChange",
    "loss_change",
    "Tuned",
    "tune",
    # answers and text
    "StoryScores",
    "Perplexity",
    "score_stories",
    "perplexity",
    "Battery",
    "PreparedBattery",
    "battery",
    "prepare_battery",
    "lm_eval_scores",
    # position
    "RotaryLayout",
    "RotaryLayer",
    "FrequencyNorms",
    "frequency_norms",
    "mask_by_frequency",
    "share_at_frequencies",
    "at_frequencies",
    "mask_rank",
    "BosAngles",
    "SinkAttention",
    "bos_angles",
    "sink_attention",
    "sink_shift",
    "AttentionPattern",
    "attention_pattern",
    "Position",
    "PositionEffects",
    "position_effects",
    "position_verdict",
    # experiments
    "KappaSweep",
    "KappaChoice",
    "Effect",
    "Claim",
    "arm_masks",
    "kappa_sweep",
    "choose_kappa",
    "effect",
    "verdict",
    "Study",
    "StudySettings",
    "study",
    "read_study",
    "StudyComparison",
    "compare_studies",
    "ComponentEffects",
    "mask_components",
    "component_effects",
    # heads
    "KnockoutDesign",
    "KnockoutMeter",
    "Knockouts",
    "HeadEffects",
    "HeadLocation",
    "PaperProtocol",
    "HeadsAndMask",
    "model_heads",
    "knockout_design",
    "measure_knockouts",
    "recover_heads",
    "locate_heads",
    "head_tasks",
    "paper_protocol",
    "mask_in_heads",
    "heads_and_mask",
    # figures and errors
    "plot",
    "TomsparseError",
]
