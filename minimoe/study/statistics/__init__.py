"""Statistics of a routing trace: each has a definition, a null and an interval, and returns a frozen result.

Layers are the model's, counted from 1; experts are counted from 0. Padding is never counted. Documents, not tokens, are
the independent unit: they are what is resampled and permuted. All intervals are at 95 %.
"""

from minimoe.study.chance import (
    MIN_DOCUMENTS,
    Estimate,
    Null,
    Result,
    document_labels,
    entropy,
    jensen_shannon,
    mutual_information,
    total_variation,
    wilson,
)
from minimoe.study.depth import (
    HeldOutGain,
    Information,
    LayerDependence,
    MutualInformation,
    information,
    layer_dependence,
)
from minimoe.study.domains import DomainLoad, domain_load
from minimoe.study.load import Load, equal_load_ratios, expert_load
from minimoe.study.paths import (
    CoActivation,
    Paths,
    Repeats,
    Repetition,
    coactivation,
    paths,
    repeats,
)
from minimoe.study.vocabulary import (
    ExpertTokens,
    PreferredExperts,
    TokenShares,
    characteristic_tokens,
    frequent_tokens,
    maximum_share_null,
    preferred_experts,
    token_shares,
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
