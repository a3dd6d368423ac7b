"""Fitting Gaussians to the views of one object."""

from .config import STRATEGIES, FitConfig
from .fit import FitResult, fit
from .scores import Scores, psnr, score

__all__ = ["STRATEGIES", "FitConfig", "FitResult", "Scores", "fit", "psnr", "score"]
