"""Training score networks (DSM, LCSS), distilling them (SIM, moment matching), and the trainer that runs either."""

from __future__ import annotations

from .learning_rate import LearningRate
from .moment_matching import MomentMatchingDistiller
from .noise_law import KarrasUniform, LogNormal
from .recipe import Recipe
from .score import ScoreTrainer
from .sim import SIMDistiller
from .trainer import Trainer

__all__ = [
    "KarrasUniform",
    "LearningRate",
    "LogNormal",
    "MomentMatchingDistiller",
    "Recipe",
    "SIMDistiller",
    "ScoreTrainer",
    "Trainer",
]
