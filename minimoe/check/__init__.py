"""Checks of the exercises: each takes the learner's own object and says what is wrong with it, or that nothing is.

    from minimoe import check

    check.top_k_router(my_router)     # one check for each task; on failure: expected, came, cause, what to reread
    check.hint("03.2")                # the next hint
    check.progress()                  # which tasks have been passed

A check compares with a solution of its own, on several shapes and seeds, and imports nothing of the library that a
later lesson builds. How to write one is in CONTRIBUTING.md, 'Exercises'.
"""

from minimoe.check.failure import CheckFailed
from minimoe.check.lesson01 import bits_remembered, block_cost, roofline, swiglu
from minimoe.check.lesson02 import dense_mixture, error_of_average, mixture_gradient, wide_mlp
from minimoe.check.lesson03 import (
    batch_independent_weights,
    choose_then_weigh,
    gate_gradient,
    noisy_router,
    top_k_router,
)
from minimoe.check.lesson04 import balance_of_layers, bias_step, kept_tokens, switch_loss
from minimoe.check.lesson05 import (
    causality_test,
    dealt_table,
    expert_choice,
    group_limited,
    transport_plan,
)
from minimoe.check.lesson06 import (
    dispatch_by_sorting,
    dropped_adds_nothing,
    experts_touched,
    plan_of_dispatch,
    slots_of_assignments,
)
from minimoe.check.lesson07 import (
    offset_in_the_weights,
    tile_takes,
    tiles_of,
    what_a_program_reads,
)
from minimoe.check.lesson08 import account, load_strictly, rms_norm, rotate_pairs, to_fused
from minimoe.check.lesson09 import (
    at_equal_time,
    bits_per_byte,
    paired_difference,
    rival_widths,
    sparse_block,
)
from minimoe.check.lesson10 import bill, mfu, slope_at, worth
from minimoe.check.lesson11 import (
    batch_hits,
    bytes_of_step,
    cached_step,
    positions,
    quantise_rows,
)
from minimoe.check.lesson12 import (
    balancedness,
    documents_needed,
    first_tokens,
    importance_and_load,
    works_left_out,
)
from minimoe.check.lesson13 import (
    bits_beyond,
    corrected_list,
    entries_needed,
    same_documents_chance,
    works_flipped,
)
from minimoe.check.lesson14 import (
    company_of_experts,
    effective_paths,
    repeats_by_chance,
    settled_beyond_chance,
)
from minimoe.check.lesson15 import ablate, logical_load, paired_interval, replay, subject_shift
from minimoe.check.lesson16 import (
    attention_cost,
    moa_weights,
    read_by_group,
    switchhead_values,
)
from minimoe.check.lesson17 import fair_steps, redrawn_units, slices_of_mlp, taught_weights
from minimoe.check.lesson18 import (
    copies_by_load,
    gathered_gradient,
    sends_by_device,
    shared_gradients,
)
from minimoe.check.lesson19 import bits_beyond_units, moving_mean, priority_kept, seasonal_split
from minimoe.check.record import hint, progress
from minimoe.check.task import TASKS, Task, find

__all__ = [
    "TASKS",
    "CheckFailed",
    "Task",
    "ablate",
    "account",
    "at_equal_time",
    "attention_cost",
    "balance_of_layers",
    "balancedness",
    "batch_hits",
    "batch_independent_weights",
    "bias_step",
    "bill",
    "bits_beyond",
    "bits_beyond_units",
    "bits_per_byte",
    "bits_remembered",
    "block_cost",
    "bytes_of_step",
    "cached_step",
    "causality_test",
    "choose_then_weigh",
    "company_of_experts",
    "copies_by_load",
    "corrected_list",
    "dealt_table",
    "dense_mixture",
    "dispatch_by_sorting",
    "documents_needed",
    "dropped_adds_nothing",
    "effective_paths",
    "entries_needed",
    "error_of_average",
    "expert_choice",
    "experts_touched",
    "fair_steps",
    "find",
    "first_tokens",
    "gate_gradient",
    "gathered_gradient",
    "group_limited",
    "hint",
    "importance_and_load",
    "kept_tokens",
    "load_strictly",
    "logical_load",
    "mfu",
    "mixture_gradient",
    "moa_weights",
    "moving_mean",
    "noisy_router",
    "offset_in_the_weights",
    "paired_difference",
    "paired_interval",
    "plan_of_dispatch",
    "positions",
    "priority_kept",
    "progress",
    "quantise_rows",
    "read_by_group",
    "redrawn_units",
    "repeats_by_chance",
    "replay",
    "rival_widths",
    "rms_norm",
    "roofline",
    "rotate_pairs",
    "same_documents_chance",
    "seasonal_split",
    "sends_by_device",
    "settled_beyond_chance",
    "shared_gradients",
    "slices_of_mlp",
    "slope_at",
    "slots_of_assignments",
    "sparse_block",
    "subject_shift",
    "swiglu",
    "switch_loss",
    "switchhead_values",
    "taught_weights",
    "tile_takes",
    "tiles_of",
    "to_fused",
    "top_k_router",
    "transport_plan",
    "what_a_program_reads",
    "wide_mlp",
    "works_flipped",
    "works_left_out",
    "worth",
]
