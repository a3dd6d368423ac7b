"""Fitting Gaussians to the views of one object."""

from .fit import FitConfig, FitResult, fit, psnr

__all__ = ["FitConfig", "FitResult", "fit", "psnr"]
