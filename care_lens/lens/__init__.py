"""What is LEGIBLE where: words that a lens reads, words in context that states are like, classes that a probe tells apart.

What ACTS is the business of ``care_lens.mediation``: a word that can be read at a patch need not be what the model goes by.
"""

from care_lens.core.arguments import checked
from care_lens.lens.errors import LensError
from care_lens.lens.logit import LensResult, logit_lens
from care_lens.lens.measures import LensMeasures
from care_lens.lens.neighbours import NeighbourResult, TextBank, nearest_text
from care_lens.lens.reading import PictureReading, kinds_of, picture_reading
from care_lens.lens.separability import SeparabilityResult, class_figures, probe_auc, separability
from care_lens.lens.states import states, stream_sites
from care_lens.lens.translators import LensTranslators, fit_jacobian_lens, fit_tuned_lens
from care_lens.lens.viewer import write_viewer

__all__ = [
    "LensError",
    "LensMeasures",
    "LensResult",
    "LensTranslators",
    "NeighbourResult",
    "PictureReading",
    "SeparabilityResult",
    "TextBank",
    "class_figures",
    "fit_jacobian_lens",
    "fit_tuned_lens",
    "kinds_of",
    "logit_lens",
    "nearest_text",
    "picture_reading",
    "probe_auc",
    "separability",
    "states",
    "stream_sites",
    "write_viewer",
]

checked(globals(), __all__)
