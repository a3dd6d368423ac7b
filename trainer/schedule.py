"""The noise schedule: shared by training and sampling through one diffusers scheduler configuration."""

from __future__ import annotations

import torch
from torch import Tensor


def alphas_cumprod(steps: int = 1000, shift: float = 1.0, zero_terminal_snr: bool = True) -> Tensor:
    """Squared signal rates [steps] in float64 of Stable Diffusion's scaled-linear schedule, moved towards noise.

    A smooth atlas keeps its shape visible under noise that would hide a photograph's detail, so the same noise level is
    easier. `shift` divides the signal-to-noise ratio by shift^2 (Hoogeboom et al. 2023, "simple diffusion", section 3.1).
    `zero_terminal_snr` rescales so that the last step is pure noise (Lin et al. 2024, algorithm 1).
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    alphas = alphas / (alphas + shift**2 * (1 - alphas))
    if zero_terminal_snr:
        roots = alphas.sqrt()
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        alphas = roots.square()
    return alphas


def scheduler_config(prediction_type: str, shift: float, zero_terminal_snr: bool) -> dict:
    """Configuration of DPMSolverMultistepScheduler that samples what this schedule trained (DPM-Solver++, Lu et al. 2022)."""
    alphas = alphas_cumprod(shift=shift, zero_terminal_snr=zero_terminal_snr)
    # The solver takes the logarithm of the last signal rate, so it must not be zero, nor above the one before.
    alphas[-1] = max(alphas[-1].item(), min(2.0**-24, alphas[-2].item() / 4))
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=alphas.dtype), alphas[:-1]])
    return {
        "num_train_timesteps": len(alphas),
        "trained_betas": betas.tolist(),
        "prediction_type": prediction_type,
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "timestep_spacing": "trailing",
    }


def schedule_of(signal_rates: Tensor) -> tuple[float, bool] | None:
    """The (shift, zero_terminal_snr) with which `alphas_cumprod` gives these cumulative signal rates [steps]; None if none does.

    The last rate is not looked at: solvers keep it above zero.
    """
    rates = signal_rates.double()
    middle = len(rates) // 2
    for zero_terminal_snr in (True, False):
        low, high = 0.01, 100.0
        for _ in range(60):  # more shift is more noise, so halving finds it
            shift = (low * high) ** 0.5
            low, high = (shift, high) if alphas_cumprod(len(rates), shift, zero_terminal_snr)[middle] > rates[middle] else (low, shift)
        shift = round((low * high) ** 0.5, 3)
        if (alphas_cumprod(len(rates), shift, zero_terminal_snr) - rates)[:-1].abs().max() < 1e-3:
            return shift, zero_terminal_snr
    return None
