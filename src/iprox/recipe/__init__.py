"""The recipe: everything a run depends on, section by section."""

from iprox.recipe.influence import (
    ALIKE,
    CURVATURE_EXAMPLES,
    CURVED,
    GRADIENT_FREE,
    MODEL_FREE,
    OF_GRADIENTS,
    GradientFree,
    InfluenceSection,
)
from iprox.recipe.recipe import STAGES, Recipe, absolute_pattern, load_recipe, parse_recipe, validate_section
from iprox.recipe.sections import (
    SIZES,
    AlignSection,
    AuditSection,
    FinetuneSection,
    LdsSection,
    ProbeSection,
    ProxySection,
    RefineSection,
    ReportSection,
    SelectSection,
    WarmupSection,
)

__all__ = [
    "ALIKE",
    "CURVATURE_EXAMPLES",
    "CURVED",
    "GRADIENT_FREE",
    "MODEL_FREE",
    "OF_GRADIENTS",
    "SIZES",
    "STAGES",
    "AlignSection",
    "AuditSection",
    "FinetuneSection",
    "GradientFree",
    "InfluenceSection",
    "LdsSection",
    "ProbeSection",
    "ProxySection",
    "Recipe",
    "RefineSection",
    "ReportSection",
    "SelectSection",
    "WarmupSection",
    "absolute_pattern",
    "load_recipe",
    "parse_recipe",
    "validate_section",
]
