"""The CPU renderer and the fitting rasteriser, against each other and against a dense reference on the same Gaussians."""

from __future__ import annotations

import torch
from _report import report, seconds

from generator.gaussians import Gaussians
from generator.model.pipeline import GaussianAtlasPipeline
from generator.render import Cameras, cpu
from trainer.fit.rasterize import rasterize


def main() -> None:
    gaussians = GaussianAtlasPipeline.from_pretrained("models/starter")("an armchair", seed=0).gaussians[0]
    rows = []
    for size in (128, 256, 512):
        cameras = Cameras.orbit(1, size)
        leaves = {name: getattr(gaussians, name).clone().requires_grad_() for name in Gaussians.__dataclass_fields__}

        def forward(cameras: Cameras = cameras, size: int = size) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                return rasterize(gaussians, cameras.viewmats[0], cameras.Ks[0], size, size)

        def both(cameras: Cameras = cameras, size: int = size, leaves: dict = leaves) -> None:
            rgb, alpha = rasterize(Gaussians(**leaves), cameras.viewmats[0], cameras.Ks[0], size, size)
            (rgb.sum() + alpha.sum()).backward()

        torch_seconds = seconds(lambda cameras=cameras: cpu.render_view(gaussians, cameras, 0))
        expected = cpu.render_view(gaussians, cameras, 0)[0]
        error = (forward()[0] - expected).square().mean()
        compiled = seconds(forward)
        rows.append(
            {
                "px": size,
                "Gaussians": len(gaussians),
                "torch renderer ms": 1e3 * torch_seconds,
                "compiled forward ms": 1e3 * compiled,
                "compiled forward+backward ms": 1e3 * seconds(both),
                "forward ratio": compiled / torch_seconds,
                "PSNR between them dB": -10 * torch.log10(error.clamp_min(1e-12)).item(),
            }
        )
    report("render", rows, "One view of a generated object, projection included, median of 5")


if __name__ == "__main__":
    main()
