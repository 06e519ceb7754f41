"""CARE lens: diagnose, learn, repair and evaluate the unsafe channels of vision-language models.

    from care_lens import HookedLVLM, Example, mediate, HybridFusion, evaluate, capture, organism, plots

Names are imported when they are first used, so that ``import care_lens`` costs nothing; type checkers see all of them. A room
(``capture``, ``plots``, ``organism``, ...) is a module: the function that captures is ``capture.capture``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from care_lens import (
        attacks,
        baselines,
        capture,
        core,
        data,
        defences,
        evaluation,
        lens,
        lvlm,
        mediation,
        organism,
        pipeline,
        planted,
        plots,
        repair,
        subspace,
    )
    from care_lens.attacks import draw_text, pgd, random_noise, typographic, wrap
    from care_lens.capture import Activations, capture_moments, select_tokens
    from care_lens.core import (
        CareLensError,
        Example,
        ExampleError,
        Interval,
        PairedExamples,
        PatchGrid,
        PrefixMargin,
        Site,
        TokenSpans,
        Turn,
        UnsafeMargin,
        Verdict,
    )
    from care_lens.data import Study, read_examples, read_study, write_examples, write_study
    from care_lens.defences import RefusalDirection
    from care_lens.evaluation import (
        ClassifierJudge,
        DefenceTable,
        GenerationStore,
        SubstringRefusalJudge,
        evaluate,
        generate_all,
        judge_answers,
        tune,
        tune_defence,
        with_answers,
    )
    from care_lens.lens import logit_lens, nearest_text
    from care_lens.lvlm import BoundLVLM, Generation, HookedLVLM, LVLMCache, LVLMInputs
    from care_lens.mediation import (
        ablate,
        attribute,
        heads,
        knockout,
        localise,
        mediate,
        neurons,
        patch_map,
        path_effects,
        separability,
        verify,
        writes_towards,
    )
    from care_lens.plots import save_figure
    from care_lens.repair import (
        ConformalGate,
        Correction,
        HybridFusion,
        NoRepair,
        Reader,
        ReaderPlan,
        Writer,
        learn_repair,
        read_scores,
    )
    from care_lens.subspace import Moments, SafetySubspace

__all__ = [
    "Activations",
    "BoundLVLM",
    "CareLensError",
    "ClassifierJudge",
    "ConformalGate",
    "Correction",
    "DefenceTable",
    "Example",
    "ExampleError",
    "Generation",
    "GenerationStore",
    "HookedLVLM",
    "HybridFusion",
    "Interval",
    "LVLMCache",
    "LVLMInputs",
    "Moments",
    "NoRepair",
    "PairedExamples",
    "PatchGrid",
    "PrefixMargin",
    "Reader",
    "ReaderPlan",
    "RefusalDirection",
    "SafetySubspace",
    "Site",
    "Study",
    "SubstringRefusalJudge",
    "TokenSpans",
    "Turn",
    "UnsafeMargin",
    "Verdict",
    "Writer",
    "__version__",
    "ablate",
    "attacks",
    "attribute",
    "baselines",
    "capture",
    "capture_moments",
    "core",
    "data",
    "defences",
    "draw_text",
    "evaluate",
    "evaluation",
    "generate_all",
    "heads",
    "judge_answers",
    "knockout",
    "learn_repair",
    "lens",
    "localise",
    "logit_lens",
    "lvlm",
    "mediate",
    "mediation",
    "nearest_text",
    "neurons",
    "organism",
    "patch_map",
    "path_effects",
    "pgd",
    "pipeline",
    "planted",
    "plots",
    "random_noise",
    "read_examples",
    "read_scores",
    "read_study",
    "repair",
    "save_figure",
    "select_tokens",
    "separability",
    "subspace",
    "tune",
    "tune_defence",
    "typographic",
    "verify",
    "with_answers",
    "wrap",
    "write_examples",
    "write_study",
    "writes_towards",
]

_ROOMS = {
    "care_lens.attacks": (
        "draw_text",
        "pgd",
        "random_noise",
        "typographic",
        "wrap",
    ),
    "care_lens.capture": (
        "Activations",
        "capture_moments",
        "select_tokens",
    ),
    "care_lens.core": (
        "CareLensError",
        "Example",
        "ExampleError",
        "Interval",
        "PairedExamples",
        "PatchGrid",
        "PrefixMargin",
        "Site",
        "TokenSpans",
        "Turn",
        "UnsafeMargin",
        "Verdict",
    ),
    "care_lens.data": (
        "Study",
        "read_examples",
        "read_study",
        "write_examples",
        "write_study",
    ),
    "care_lens.defences": ("RefusalDirection",),
    "care_lens.evaluation": (
        "ClassifierJudge",
        "DefenceTable",
        "GenerationStore",
        "SubstringRefusalJudge",
        "evaluate",
        "generate_all",
        "judge_answers",
        "tune",
        "tune_defence",
        "with_answers",
    ),
    "care_lens.lens": (
        "logit_lens",
        "nearest_text",
    ),
    "care_lens.lvlm": (
        "BoundLVLM",
        "Generation",
        "HookedLVLM",
        "LVLMCache",
        "LVLMInputs",
    ),
    "care_lens.mediation": (
        "ablate",
        "attribute",
        "heads",
        "knockout",
        "localise",
        "mediate",
        "neurons",
        "patch_map",
        "path_effects",
        "separability",
        "verify",
        "writes_towards",
    ),
    "care_lens.plots": ("save_figure",),
    "care_lens.repair": (
        "ConformalGate",
        "Correction",
        "HybridFusion",
        "NoRepair",
        "Reader",
        "ReaderPlan",
        "Writer",
        "learn_repair",
        "read_scores",
    ),
    "care_lens.subspace": (
        "Moments",
        "SafetySubspace",
    ),
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"care_lens.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
