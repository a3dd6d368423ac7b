"""How one object is fitted."""

from __future__ import annotations

from dataclasses import dataclass

from generator.errors import InputError

# What each does is in strategies.py; docs/fitting.md compares them.
STARTS = ("depth", "outline")
STRATEGIES = ("fixed", "default", "mcmc", "scaffold", "visibility", "contribution", "opacity")
BOUNDED = ("mcmc", "visibility", "contribution", "opacity")


@dataclass(frozen=True)
class FitConfig:
    """How one object is fitted. Rates are per Adam step.

    Raises:
        InputError: a field is out of range.
    """

    count: int = 4096  # Gaussians; "fixed" keeps exactly as many, the other strategies start from them
    start: str = "depth"  # where they start: on the surface that the views' depth shows, or carved from their "outline" (slower)
    steps: int = 150  # optimisation steps, one view each; 0 keeps the surface initialisation
    means_rate: float = 4e-4  # object lengths
    quaternions_rate: float = 2e-3
    scales_rate: float = 1.5e-2  # log units
    opacities_rate: float = 4e-2  # logit units
    colors_rate: float = 1e-2  # display values
    ssim_weight: float = 0.2  # share of 1 - SSIM in the photometric loss (Kerbl et al. 2023, eq. 7)
    alpha_weight: float = 0.5  # L1 on the coverage
    scale_weight: float = 0.02  # on the mean scale over the initial one: keeps Gaussians from growing needles
    volume_weight: float = 0.0  # on the mean product of scales (Scaffold-GS: 0.01, made for scenes; cubic lengths are tiny here)
    opacity_weight: float = 0.002  # "fixed" pulls towards opaque: a surface of few, solid splats is easier to learn
    perceptual_weight: float = 0.0  # on the perceptual distance; finer texture, at several times the seconds a step
    perceptual_every: int = 4  # steps from one perceptual loss to the next; a larger weight does not make up for it
    perceptual_crop: int = 128  # pixels, side of the square it looks at; time grows with its area
    perceptual_score: bool = True  # measure held-out views with it, where it can be had: a third of a second each at 256 pixels
    seed: int = 0

    strategy: str = "fixed"  # how Gaussians come and go: fixed, default, mcmc, scaffold, visibility, contribution or opacity
    bound: int = 36_864  # Gaussians that mcmc and the pruning strategies never exceed (the paper's tau, 192 x 192)
    refine_every: int = 15  # steps between two changes of the set; each change needs time to settle
    refine_from: float = 0.05  # share of the steps before the first change
    refine_until: float = 0.7  # share of the steps after which the set stays: the rest settles it
    grow_gradient: float = 2e-4  # mean slope of the loss in a splat's place (half picture sides) that grows; lower grows more
    minimum_opacity: float = 0.005  # fainter Gaussians are dead: removed, or moved by mcmc
    anchor_size: float = 0.04  # object lengths, side of the coarsest voxel that holds an anchor; smaller grows finer
    anchor_levels: int = 3  # voxel sizes, each a quarter of the one before
    anchor_offsets: int = 4  # Gaussians of a new anchor; more grow faster and coarser
    anchor_growth: float = 0.25  # share of the set that one change adds at most; more leaves holes where the bound cuts
    mcmc_noise: float = 5e5  # over the rate of the means: how far uncertain Gaussians wander
    mcmc_weight: float = 0.01  # on mean opacity and mean scale: lets useless Gaussians die so that they can move

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise InputError(f"fit.start is {self.start!r}: choose one of {', '.join(STARTS)}")
        if self.strategy not in STRATEGIES:
            raise InputError(f"fit.strategy is {self.strategy!r}: choose one of {', '.join(STRATEGIES)}")
        for name in ("count", "bound", "refine_every", "perceptual_every", "anchor_levels", "anchor_offsets"):
            if getattr(self, name) < 1:
                raise InputError(f"fit.{name} must be at least 1, got {getattr(self, name)}")
        if self.strategy in BOUNDED and self.count > self.bound:
            raise InputError(f"fit.count is {self.count}, more than fit.bound, {self.bound}: start with fewer or raise the bound")
        if self.perceptual_crop < 32:
            raise InputError(f"fit.perceptual_crop must be at least 32 pixels, got {self.perceptual_crop}")
        if not 0 <= self.refine_from <= self.refine_until <= 1:
            raise InputError(f"fit.refine_from and fit.refine_until must be ordered shares, got {self.refine_from} and {self.refine_until}")
