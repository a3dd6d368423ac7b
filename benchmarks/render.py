"""The CPU renderers against each other and the reference, and gsplat where there is CUDA: milliseconds a view, decibels between them.

The Gaussians are real fits if a folder of .ply is given, else what the starter model draws, doubled to the wanted number.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _atlases import objects, source
from _report import report, seconds

from generator.gaussians import Gaussians, concatenate
from generator.render import Cameras, compiled, cpu, cuda, reference
from generator.render.cameras import RADIUS
from trainer.atlas import resize

FIELDS = tuple(Gaussians.__dataclass_fields__)


def several(gaussians: Gaussians, count: int) -> Gaussians:
    """Exactly `count` Gaussians: merged, or repeated a little aside."""
    while len(gaussians) < count:
        aside = gaussians.scales.amax(1, keepdim=True) * torch.randn(len(gaussians), 3, generator=torch.Generator().manual_seed(0))
        gaussians = concatenate([gaussians, gaussians.replace(means=gaussians.means + aside)])
    return resize(gaussians, count)


def forward(backend, gaussians: Gaussians, cameras: Cameras) -> torch.Tensor:
    with torch.no_grad():
        return backend.render_views(gaussians, cameras)[0]


def both(backend, gaussians: Gaussians, cameras: Cameras) -> None:
    """Forward and backward, with a gradient in every pixel and field."""
    leaves = Gaussians(**{name: getattr(gaussians, name).detach().requires_grad_() for name in FIELDS})
    color, alpha, depth, *_ = backend.render_views(leaves, cameras)
    (color.sum() + alpha.sum() + depth.sum()).backward()


def decibels(image: torch.Tensor, expected: torch.Tensor) -> float:
    return -10 * float(torch.log10((image.cpu().double() - expected.double()).square().mean().clamp_min(1e-20)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fits", nargs="?", type=Path, help="folder of fitted .ply files; without it, one that the starter model draws")
    parser.add_argument("--count", type=int, default=16384, help="Gaussians (default: 16384)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512], help="pixels, image sides (default: 128 256 512)")
    options = parser.parse_args()
    gaussians = several(objects(options.fits, 1)[0], options.count)
    backends = {"torch": (cpu, gaussians), "compiled": (compiled, gaussians)}
    if torch.cuda.is_available():
        backends["gsplat"] = (cuda, gaussians.to("cuda"))
    rows = []
    # The reference takes a second for a few hundred Gaussians: a sample of them, large enough to cover each other.
    sample = resize(gaussians, 400)
    truth = reference.render_views(sample.to(torch.float64), Cameras.orbit(1, 64, radius=RADIUS))[0]
    for size in options.sizes:
        cameras = Cameras.orbit(1, size, radius=RADIUS)
        expected, base = forward(cpu, gaussians, cameras), None
        for name, (backend, held) in backends.items():
            times = [1e3 * seconds(lambda work=work: work(backend, held, cameras), 9) for work in (forward, both)]  # noqa: B023
            base = base or times
            rows.append({
                "px": size,
                "backend": name,
                "forward ms": times[0],
                "with gradients ms": times[1],
                "forward, of torch": times[0] / base[0],
                "gradients, of torch": times[1] / base[1],
                "dB to torch": decibels(forward(backend, held, cameras), expected),
                "dB to the reference": decibels(forward(backend, sample.to(held.means.device), Cameras.orbit(1, 64, radius=RADIUS)), truth),
            })  # fmt: skip
    note = f"{options.count} Gaussians of {source(options.fits)}, one view, median of 9, {torch.get_num_threads()} threads"
    report("render", rows, note)


if __name__ == "__main__":
    main()
