"""Checks of the exercises: each takes the learner's own object and says what is wrong with it, or that nothing is.

    from minimoe import check

    check.top_k_router(my_router)     # one check for each task; on failure: expected, came, cause, what to reread
    check.hint("03.2")                # the next hint
    check.progress()                  # which tasks have been passed

A check compares with a solution of its own, on several shapes and seeds, and imports nothing of the library that a
later lesson builds. How to write one is in CONTRIBUTING.md, 'Exercises'.
"""

from minimoe.check.failure import CheckFailed
from minimoe.check.hints import hint
from minimoe.check.lesson01.block import swiglu
from minimoe.check.lesson01.capacity import bits_remembered
from minimoe.check.lesson01.cost import block_cost
from minimoe.check.lesson01.roofline import roofline
from minimoe.check.lesson02.disagreement import error_of_average
from minimoe.check.lesson02.gate import mixture_gradient
from minimoe.check.lesson02.mixture import dense_mixture
from minimoe.check.lesson02.wide import wide_mlp
from minimoe.check.lesson03.gradient import gate_gradient
from minimoe.check.lesson03.museum import batch_independent_weights
from minimoe.check.lesson03.noise import noisy_router
from minimoe.check.lesson03.orders import choose_then_weigh
from minimoe.check.lesson03.router import top_k_router
from minimoe.check.lesson04.bias import bias_step
from minimoe.check.lesson04.capacity import kept_tokens
from minimoe.check.lesson04.museum import balance_of_layers
from minimoe.check.lesson04.switch import switch_loss
from minimoe.check.lesson05.causality import causality_test
from minimoe.check.lesson05.choice import expert_choice
from minimoe.check.lesson05.museum import group_limited
from minimoe.check.lesson05.table import dealt_table
from minimoe.check.lesson05.transport import transport_plan
from minimoe.check.lesson06.dispatch import dispatch_by_sorting
from minimoe.check.lesson06.museum import dropped_adds_nothing
from minimoe.check.lesson06.plan import plan_of_dispatch
from minimoe.check.lesson06.slots import slots_of_assignments
from minimoe.check.lesson06.touched import experts_touched
from minimoe.check.record import progress
from minimoe.check.task import TASKS, Task, find

__all__ = [
    "TASKS",
    "CheckFailed",
    "Task",
    "balance_of_layers",
    "batch_independent_weights",
    "bias_step",
    "bits_remembered",
    "block_cost",
    "causality_test",
    "choose_then_weigh",
    "dealt_table",
    "dense_mixture",
    "dispatch_by_sorting",
    "dropped_adds_nothing",
    "error_of_average",
    "expert_choice",
    "experts_touched",
    "find",
    "gate_gradient",
    "group_limited",
    "hint",
    "kept_tokens",
    "mixture_gradient",
    "noisy_router",
    "plan_of_dispatch",
    "progress",
    "roofline",
    "slots_of_assignments",
    "swiglu",
    "switch_loss",
    "top_k_router",
    "transport_plan",
    "wide_mlp",
]
