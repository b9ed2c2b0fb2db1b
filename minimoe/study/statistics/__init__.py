"""Statistics of a routing trace: each has a definition, a null and an interval, and returns a frozen result.

Layers are the model's, counted from 1; experts are counted from 0. Padding is never counted. Documents, not tokens, are
the independent unit: they are what is resampled and permuted. All intervals are at 95 %.
"""

from minimoe.study.statistics.coactivation import CoActivation, coactivation
from minimoe.study.statistics.counts import document_labels
from minimoe.study.statistics.depth import LayerDependence, layer_dependence
from minimoe.study.statistics.domains import DomainLoad, domain_load
from minimoe.study.statistics.heldout import HeldOutGain
from minimoe.study.statistics.information import Information, MutualInformation, information
from minimoe.study.statistics.loads import Load, equal_load_ratios, expert_load
from minimoe.study.statistics.measures import (
    entropy,
    jensen_shannon,
    mutual_information,
    total_variation,
)
from minimoe.study.statistics.neighbours import Repeats, Repetition, repeats
from minimoe.study.statistics.paths import Paths, paths
from minimoe.study.statistics.resampling import MIN_DOCUMENTS, wilson
from minimoe.study.statistics.results import Estimate, Null, Result
from minimoe.study.statistics.tokens import (
    PreferredExperts,
    TokenShares,
    maximum_share_null,
    preferred_experts,
    token_shares,
)
from minimoe.study.statistics.vocabulary import (
    ExpertTokens,
    characteristic_tokens,
    frequent_tokens,
)

__all__ = [
    "MIN_DOCUMENTS",
    "CoActivation",
    "DomainLoad",
    "Estimate",
    "ExpertTokens",
    "HeldOutGain",
    "Information",
    "LayerDependence",
    "Load",
    "MutualInformation",
    "Null",
    "Paths",
    "PreferredExperts",
    "Repeats",
    "Repetition",
    "Result",
    "TokenShares",
    "characteristic_tokens",
    "coactivation",
    "document_labels",
    "domain_load",
    "entropy",
    "equal_load_ratios",
    "expert_load",
    "frequent_tokens",
    "information",
    "jensen_shannon",
    "layer_dependence",
    "maximum_share_null",
    "mutual_information",
    "paths",
    "preferred_experts",
    "repeats",
    "token_shares",
    "total_variation",
    "wilson",
]
