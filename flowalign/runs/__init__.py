"""The composition root: every command is one function here, and this is the one place where the parts meet.

All verbs return values that can be written as JSON, with a `summary` for people. They are imported when first asked for, so
that scoring does not load what training needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowalign.runs.adapting import adapt as adapt
    from flowalign.runs.calibration import calibrate as calibrate
    from flowalign.runs.comparisons import audit as audit
    from flowalign.runs.exploring import explore as explore
    from flowalign.runs.flow_fit import fit_field as fit_field
    from flowalign.runs.flows import apply_flow as apply_flow
    from flowalign.runs.flows import evaluate_flow as evaluate_flow
    from flowalign.runs.flows import fit_flow as fit_flow
    from flowalign.runs.folders import cache_clear as cache_clear
    from flowalign.runs.folders import cache_list as cache_list
    from flowalign.runs.folders import export_kohya as export_kohya
    from flowalign.runs.folders import report as report
    from flowalign.runs.implicit import margins as margins
    from flowalign.runs.improvement import improve as improve
    from flowalign.runs.merging import merge as merge
    from flowalign.runs.pictures import evaluate as evaluate
    from flowalign.runs.pictures import generate as generate
    from flowalign.runs.rewards import list_rewards as list_rewards
    from flowalign.runs.scoring import score as score
    from flowalign.runs.selection import select as select
    from flowalign.runs.serving import serve as serve
    from flowalign.runs.training import align as align
    from flowalign.runs.training import plan as plan
    from flowalign.runs.training import suggest_beta as suggest_beta

_VERBS = {
    "training": ("align", "plan", "suggest_beta"),
    "adapting": ("adapt",),
    "flows": ("fit_flow", "apply_flow", "evaluate_flow"),
    "flow_fit": ("fit_field",),
    "improvement": ("improve",),
    "pictures": ("generate", "evaluate"),
    "merging": ("merge",),
    "rewards": ("list_rewards",),
    "scoring": ("score",),
    "calibration": ("calibrate",),
    "selection": ("select",),
    "implicit": ("margins",),
    "comparisons": ("audit",),
    "serving": ("serve",),
    "exploring": ("explore",),
    "folders": ("report", "export_kohya", "cache_list", "cache_clear"),
}
_MODULES = {verb: module for module, verbs in _VERBS.items() for verb in verbs}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"flowalign.runs.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'flowalign.runs' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
