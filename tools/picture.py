"""The README's picture: prompts, seed 0, drawn by the bundled model and the CPU renderer. `.venv/bin/python tools/picture.py`"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generator.model.pipeline import GaussianAtlasPipeline  # noqa: E402
from generator.render import Cameras, render, save_png  # noqa: E402

PROMPTS = (
    "an armchair", "a red armchair", "a lamp", "a car", "a blue car", "a plant",
    "a bed", "a table", "a sofa", "a bookcase", "a vase", "a horse",
)  # fmt: skip
COLUMNS = 6
SIZE = 256  # pixels, side of one picture


def main() -> None:
    import torch

    pipeline = GaussianAtlasPipeline.from_pretrained(ROOT / "models" / "starter")
    cameras = Cameras.orbit(1, SIZE)
    pictures = [render(pipeline(prompt, seed=0).gaussians[0], cameras).rgb[0] for prompt in PROMPTS]
    rows = [torch.cat(pictures[start : start + COLUMNS], dim=1) for start in range(0, len(pictures), COLUMNS)]
    output = ROOT / "docs" / "images" / "starter.png"
    output.parent.mkdir(exist_ok=True)
    save_png(torch.cat(rows), output)
    print(f"{output.relative_to(ROOT)}: {', '.join(PROMPTS)}")


if __name__ == "__main__":
    main()
