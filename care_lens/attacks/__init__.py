"""Attacks on the picture and on the words, all under one protocol: ``run(lvlm, examples, defence=None, seed=0) -> AttackResult``.

In words: templates, prefix injection, refusal suppression, prefill, several turns, spelling. In the picture: typographic, PGD, MI-FGSM, auto-PGD,
unconstrained and universal, with random noise and clean pictures as controls. Without gradients: best of n, random and evolutionary search.
"""

from care_lens.attacks.common import judged
from care_lens.attacks.gradient import GradientAttack, HiddenGradientError, RoundTripError
from care_lens.attacks.kinds import AttackKindError, attack, register_attack, registered_attacks
from care_lens.attacks.losses import AttackLoss, OutcomeLoss, TargetLikelihood
from care_lens.attacks.noise import RandomNoise, random_noise
from care_lens.attacks.objective import PictureObjective
from care_lens.attacks.pgd import MIFGSM, PGD, AutoPGD, PGDResult, Unconstrained, pgd
from care_lens.attacks.pixels import PixelMap, as_seen
from care_lens.attacks.preprocessing import PicturePath, PreprocessingError
from care_lens.attacks.scores import JudgeScore, LossScore, Score
from care_lens.attacks.search import BestOfN, EvolutionarySearch, RandomSearch, ScoreError, SearchAttack
from care_lens.attacks.targets import TargetLoss
from care_lens.attacks.templates import (
    TEMPLATES,
    Clean,
    ExampleAttack,
    Prefill,
    PrefixInjection,
    RefusalSuppression,
    SeveralTurns,
    Spelled,
    Wrapper,
    wrap,
)
from care_lens.attacks.typographic import DrawingError, TextStyle, Typographic, draw_text, text_styles, typographic
from care_lens.attacks.universal import UniversalPGD, perturbed, universal_perturbation
from care_lens.attacks.variations import Choices, Renderings, Reworded, ScrambledWords, SearchSpace
from care_lens.core.arguments import checked
from care_lens.core.attack import Attack, AttackResult

__all__ = [
    "MIFGSM",
    "PGD",
    "TEMPLATES",
    "Attack",
    "AttackKindError",
    "AttackLoss",
    "AttackResult",
    "AutoPGD",
    "BestOfN",
    "Choices",
    "Clean",
    "DrawingError",
    "EvolutionarySearch",
    "ExampleAttack",
    "GradientAttack",
    "HiddenGradientError",
    "JudgeScore",
    "LossScore",
    "OutcomeLoss",
    "PGDResult",
    "PictureObjective",
    "PicturePath",
    "PixelMap",
    "Prefill",
    "PrefixInjection",
    "PreprocessingError",
    "RandomNoise",
    "RandomSearch",
    "RefusalSuppression",
    "Renderings",
    "Reworded",
    "RoundTripError",
    "Score",
    "ScoreError",
    "ScrambledWords",
    "SearchAttack",
    "SearchSpace",
    "SeveralTurns",
    "Spelled",
    "TargetLikelihood",
    "TargetLoss",
    "TextStyle",
    "Typographic",
    "Unconstrained",
    "UniversalPGD",
    "Wrapper",
    "as_seen",
    "attack",
    "draw_text",
    "judged",
    "perturbed",
    "pgd",
    "random_noise",
    "register_attack",
    "registered_attacks",
    "text_styles",
    "typographic",
    "universal_perturbation",
    "wrap",
]

checked(globals(), __all__)
