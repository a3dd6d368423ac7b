"""How the set of Gaussians changes during a fit, as strategies of gsplat (Ye et al. 2024).

Parameters and optimisers are gsplat's dictionaries: means [N, 3], scales [N, 3] (log), quats [N, 4], opacities [N] (logit)
and colors [N, 3]; `info` is what its rasteriser reports: means2d [C, N, 2] with gradients, radii [C, N, 2], width, height
and n_cameras. So these run on its renderer too, and its own strategies on ours.

default        densification of 3D Gaussian Splatting, gsplat's own; no bound
mcmc           dead Gaussians move to live ones, and as many are added as the bound allows (Kheradmand et al. 2024)
scaffold       anchors on a grid of voxels, each with several Gaussians; grows where gradients are high; no bound
visibility     scaffold; beyond the bound those of lowest rank in tracked opacity and anchor visibility go (the Gaussian Atlas paper)
contribution   the same, with the blended weight in random views, which knows occlusion, in place of opacity
opacity        scaffold; beyond the bound the faintest go
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gsplat.strategy import DefaultStrategy, Strategy
from gsplat.strategy.ops import remove
from torch import Tensor

from generator.gaussians import quaternions_to_matrices

from .config import FitConfig

Params = dict[str, torch.nn.Parameter]
Optimizers = dict[str, torch.optim.Optimizer]

# Share of a full set that one change replaces; more leaves holes that the next steps cannot close.
_TURNOVER = 0.05
# Coincident Gaussians that one is taken for at most; the alternating sum of equation 9 loses digits beyond.
_STACK = 51


def strategy_for(config: FitConfig, weigh: Callable[[], Tensor]) -> Strategy | None:
    """The strategy that `config.strategy` names; None for "fixed".

    Args:
        weigh: gives each Gaussian's mean blended weight [N] over some random views.
    """
    name = config.strategy
    if name == "fixed":
        return None
    start, stop, every = int(config.refine_from * config.steps), int(config.refine_until * config.steps), config.refine_every
    if name == "default":
        return DefaultStrategy(
            prune_opa=config.minimum_opacity,
            grow_grad2d=config.grow_gradient,
            refine_start_iter=start,
            refine_stop_iter=stop,
            refine_every=every,
            reset_every=config.steps + 1,  # a fit of some hundred steps has no time to recover from a reset
        )
    if name == "mcmc":
        rounds = max(1, sum(step % every == 0 for step in range(start + 1, stop)))
        growth = max(0.05, (config.bound / config.count) ** (1 / rounds) - 1)
        return Mcmc(config.bound, growth, start, stop, every, config.minimum_opacity, config.mcmc_noise, config.mcmc_weight)
    return Anchors(
        ranking=None if name == "scaffold" else name,
        bound=None if name == "scaffold" else config.bound,
        voxel=config.anchor_size,
        levels=config.anchor_levels,
        offsets=config.anchor_offsets,
        growth=config.anchor_growth,
        gradient=config.grow_gradient,
        start=start,
        stop=stop,
        every=every,
        minimum_opacity=config.minimum_opacity,
        weigh=weigh,
    )


# --- 3D Gaussian Splatting as Markov Chain Monte Carlo -------------------------------------------------------------------


def relocation(opacities: Tensor, scales: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Opacities [N] and scales [N, 3] with which `counts` [N] coincident Gaussians look like the one that was there.

    Kheradmand et al. 2024, equation 9. Its double sum over i and k of binomials (i-1 over k) is a single one over
    (N over k+1), because binomials add up along a diagonal of Pascal's triangle.
    """
    old, stack = opacities.double(), counts.clamp(1, _STACK)
    new = 1 - (1 - old) ** (1 / stack)
    term = torch.arange(1, _STACK + 1, dtype=torch.float64, device=old.device)
    # log(N over k), minus infinity where k > N, whose exponential is 0.
    lowest = stack[:, None] - term
    binomials = torch.lgamma(stack[:, None] + 1.0) - torch.lgamma(term + 1) - torch.lgamma(lowest.clamp_min(0) + 1)
    magnitude = torch.exp(binomials + term * torch.log(new.clamp_min(1e-30))[:, None]) / term.sqrt()
    series = torch.where(lowest >= 0, magnitude * (-1) ** (term + 1), 0.0).sum(1)
    return new.to(opacities.dtype), scales * (old / series).to(scales.dtype)[:, None]


@dataclass
class Mcmc(Strategy):
    """Relocation, growth to a cap, and noise (Kheradmand et al. 2024, sections 3.2 to 3.4)."""

    bound: int  # Gaussians at most
    growth: float  # share of the set that is added at each refinement
    start: int  # steps
    stop: int
    every: int
    minimum_opacity: float
    noise: float  # over the rate of the means
    weight: float  # on mean opacity and mean scale

    def initialize_state(self) -> dict:
        return {}

    def regularizer(self, opacities: Tensor, scales: Tensor) -> Tensor:
        return self.weight * (opacities.mean() + scales.mean())

    @torch.no_grad()
    def step_post_backward(self, params: Params, optimizers: Optimizers, state: dict, step: int, info: dict) -> None:
        if self.start < step < self.stop and step % self.every == 0:
            dead = torch.sigmoid(params["opacities"]) <= self.minimum_opacity
            if dead.any() and not dead.all():
                self._stack(params, optimizers, state, int(dead.sum()), dead)
            wanted = min(self.bound, math.ceil((1 + self.growth) * len(dead)))
            if wanted > len(dead):
                self._stack(params, optimizers, state, wanted - len(dead), None)
        self._wander(params, optimizers["means"].param_groups[0]["lr"])

    def _stack(self, params: Params, optimizers: Optimizers, state: dict, count: int, dead: Tensor | None) -> None:
        """Lay `count` Gaussians on live ones, drawn by opacity; the dead ones move there, otherwise new ones appear."""
        opacities = torch.sigmoid(params["opacities"])
        chances = opacities if dead is None else opacities * ~dead
        sources = torch.multinomial(chances, count, replacement=True)
        hit, copies = torch.unique(sources, return_counts=True)
        new, scales = relocation(opacities[hit], torch.exp(params["scales"][hit]), copies + 1)
        params["opacities"].data[hit] = torch.logit(new.clamp(self.minimum_opacity, 1 - 1e-6))
        params["scales"].data[hit] = torch.log(scales)
        # What moved keeps no momentum.
        moved = hit if dead is None else torch.cat([hit, dead.nonzero()[:, 0]])
        for name, optimizer in optimizers.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in optimizer.state[params[name]]:
                    optimizer.state[params[name]][moment][moved] = 0
        if dead is None:
            append(params, optimizers, state, {name: value[sources] for name, value in params.items()}, sources)
        else:
            for value in params.values():
                value.data[dead] = value.data[sources]

    def _wander(self, params: Params, rate: float) -> None:
        """Noise along each Gaussian's own shape, for the faint ones alone (equation 8)."""
        faint = torch.sigmoid(-100 * (torch.sigmoid(params["opacities"]) - 0.005))
        half = quaternions_to_matrices(params["quats"]) * torch.exp(params["scales"])[:, None, :]
        noise = (half @ (half.transpose(1, 2) @ torch.randn_like(params["means"])[..., None]))[..., 0]
        params["means"].data += rate * self.noise * faint[:, None] * noise


# --- anchors, and the ranks that bound them ------------------------------------------------------------------------------


@dataclass
class Anchors(Strategy):
    """Growth from anchors on a grid, and a bound kept by rank.

    Scaffold-GS (Lu et al. 2024, section 3.3) reads a Gaussian's attributes from its anchor's features and the view. Without the
    view they are constants of the Gaussian, so here each Gaussian carries its own and remembers its anchor's place; nothing has
    to be baked in the end. A new anchor appears in a voxel that has none and where a Gaussian's place has a steep slope;
    at level m voxels are a 4^m-th and the slope must be 2^m times the first.
    """

    ranking: str | None  # visibility, contribution, opacity; None leaves the number free
    bound: int | None  # Gaussians at most, after every step
    voxel: float  # object lengths
    levels: int
    offsets: int  # Gaussians of a new anchor
    growth: float  # share of the set that is added at each refinement, at most
    gradient: float  # slope of the loss, half picture sides
    start: int  # steps
    stop: int
    every: int
    minimum_opacity: float
    weigh: Callable[[], Tensor]

    def initialize_state(self) -> dict:
        return {"gradient": None, "seen": None, "opacity": None, "anchor": None, "views": 0}

    def step_pre_backward(self, params: Params, optimizers: Optimizers, state: dict, step: int, info: dict) -> None:
        info["means2d"].retain_grad()

    @torch.no_grad()
    def step_post_backward(self, params: Params, optimizers: Optimizers, state: dict, step: int, info: dict) -> None:
        if step >= self.stop:
            return
        if state["anchor"] is None:
            state["anchor"] = (torch.floor(params["means"].detach() / self.voxel) + 0.5) * self.voxel  # [N, 3]
            for name in ("gradient", "seen", "opacity"):
                state[name] = torch.zeros(len(params["means"]), device=params["means"].device)
        self._track(params, state, info)
        if step > self.start and step % self.every == 0:
            self._prune_dead(params, optimizers, state)
            self._grow(params, optimizers, state)
            if self.bound is not None and len(params["means"]) > self.bound:
                self._keep_bound(params, optimizers, state, self.bound)
            state["views"] = 0
            for name in ("gradient", "seen", "opacity"):
                state[name].zero_()

    def _track(self, params: Params, state: dict, info: dict) -> None:
        visible = (info["radii"] > 0).all(-1)  # [C, N]
        side = torch.tensor([info["width"], info["height"]], device=visible.device) * (info["n_cameras"] / 2)
        state["gradient"] += ((info["means2d"].grad * side).norm(dim=-1) * visible).sum(0)
        state["seen"] += visible.sum(0)
        state["opacity"] += visible.sum(0) * torch.sigmoid(params["opacities"])
        state["views"] += len(visible)

    def _prune_dead(self, params: Params, optimizers: Optimizers, state: dict) -> None:
        dead = torch.sigmoid(params["opacities"]) < self.minimum_opacity
        if dead.any() and not dead.all():
            remove(params, optimizers, state, dead)

    def _grow(self, params: Params, optimizers: Optimizers, state: dict) -> None:
        slopes = state["gradient"] / state["seen"].clamp_min(1)
        means, scales = params["means"].detach(), torch.exp(params["scales"].detach())
        own_sources, own_anchors = [], []  # of each level
        taken = state["anchor"]
        for level in range(self.levels):
            size = self.voxel / 4**level
            steep = (slopes > self.gradient * 2**level).nonzero()[:, 0]
            # The steepest Gaussian of a voxel stands for it: the stable sort by voxel keeps it first.
            steep = steep[torch.argsort(slopes[steep], descending=True, stable=True)]
            places = torch.floor(means[steep] / size).long()
            steep, places = first_of_each(places, steep)
            free = ~is_among(places, torch.floor(taken / size).long())
            own_sources.append(steep[free])
            own_anchors.append((places[free] + 0.5) * size)
            taken = torch.cat([taken, own_anchors[-1]])
        sources, anchors = torch.cat(own_sources), torch.cat(own_anchors)
        if not len(sources):
            return
        most = self.growth * len(means)
        if self.bound is not None:
            most = min(most, max(self.bound - len(means), _TURNOVER * self.bound))
        steepest = torch.argsort(slopes[sources], descending=True, stable=True)[: max(1, int(most) // self.offsets)]
        sources, anchors = sources[steepest], anchors[steepest]
        sources, anchors = (part.repeat_interleave(self.offsets, 0) for part in (sources, anchors))
        shifts = quaternions_to_matrices(params["quats"].detach()[sources]) @ (scales[sources] * torch.randn_like(anchors))[..., None]
        new = {name: value.detach()[sources] for name, value in params.items()}
        new["means"] = new["means"] + shifts[..., 0]
        # As much area as the one that they refine.
        new["scales"] = new["scales"] - 0.5 * math.log(self.offsets)
        append(params, optimizers, state, new, sources)
        state["anchor"][-len(sources) :] = anchors

    def _keep_bound(self, params: Params, optimizers: Optimizers, state: dict, bound: int) -> None:
        opacities = torch.sigmoid(params["opacities"].detach())
        if self.ranking == "opacity":
            ranks = fractional_ranks(opacities)
        else:
            tracked = self.weigh() if self.ranking == "contribution" else state["opacity"] / max(1, state["views"])
            ranks = visibility_ranks(tracked, torch.unique(state["anchor"], dim=0, return_inverse=True)[1])
        lowest = torch.argsort(ranks, stable=True)[: len(ranks) - bound]
        mask = torch.zeros(len(ranks), dtype=torch.bool, device=ranks.device)
        mask[lowest] = True
        remove(params, optimizers, state, mask)


def visibility_ranks(tracked: Tensor, anchors: Tensor) -> Tensor:
    """The paper's rank [N]: of each Gaussian's tracked visibility [N] and of its anchor's, averaged. The lowest goes first.

    An anchor (indices [N]) is as visible as its Gaussians together.
    """
    together = torch.zeros(int(anchors.max()) + 1, dtype=tracked.dtype, device=tracked.device).index_add_(0, anchors, tracked)
    return (fractional_ranks(tracked) + fractional_ranks(together[anchors])) / 2


def fractional_ranks(values: Tensor) -> Tensor:
    """Ranks [N] from 0, the lowest value first; equal values share the mean of their ranks."""
    _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = torch.cumsum(counts, 0)
    return (last - (counts + 1) / 2)[which]


def first_of_each(places: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the items [M] at each place [M, 3], and those places."""
    unique, which = torch.unique(places, dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(items), dtype=torch.long, device=items.device)
    first.scatter_reduce_(0, which, torch.arange(len(items), device=items.device), "amin")
    return items[first], unique


def is_among(places: Tensor, others: Tensor) -> Tensor:
    """Mask [M] of the integer places [M, 3] that occur among others [L, 3]."""
    unique, which = torch.unique(torch.cat([others, places]), dim=0, return_inverse=True)
    present = torch.zeros(len(unique), dtype=torch.bool, device=places.device)
    present[which[: len(others)]] = True
    return present[which[len(others) :]]


@torch.no_grad()
def append(params: Params, optimizers: Optimizers, state: dict, new: dict[str, Tensor], sources: Tensor) -> None:
    """Add Gaussians, in the parameters without momentum, in the tensors of `state` as their sources have them."""
    for name, old in list(params.items()):
        grown = torch.nn.Parameter(torch.cat([old.detach(), new[name].detach()]))
        params[name] = grown
        optimizer = optimizers[name]
        optimizer.param_groups[0]["params"] = [grown]
        moments = optimizer.state.pop(old, {})
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.shape == old.shape:
                moments[key] = torch.cat([value, torch.zeros_like(new[name])])
        optimizer.state[grown] = moments
    for key, value in state.items():
        if isinstance(value, Tensor):
            state[key] = torch.cat([value, value[sources]])
