"""The pictures of the docs, drawn by the bundled model and the CPU renderer; nothing is selected.

.venv/bin/python tools/picture.py [starter] [variations] [inpainting] [morph] [mix]      (all of them without a name)
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from generator.atlas import morph  # noqa: E402
from generator.model.pipeline import GaussianAtlasPipeline  # noqa: E402
from generator.render import Cameras, render, save_png  # noqa: E402

# Chosen beforehand; nothing is selected.
GALLERY = (
    "an armchair", "a red armchair", "a wooden chair", "a stool", "a sofa", "a leather sofa",
    "a bed", "a table", "a desk", "a bookcase", "a wardrobe", "a lamp",
    "a street lamp", "a plant", "a christmas tree", "a vase", "a cup", "a car",
    "a blue car", "a bicycle", "a horse", "a teddy bear", "a guitar", "a piano",
)  # fmt: skip
COLUMNS = 6
SIZE, SMALL = 256, 160  # pixels, side of one picture

VARIED = ("an armchair", "a plant")
STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
# The part above this share of the Gaussians is made anew, with another prompt.
UPPER = 0.5
INPAINTED = (("an armchair", "a red armchair"), ("a plant", "a red plant"), ("a table", "a blue table"), ("a lamp", "a blue lamp"))
MORPHED = (("an armchair", "a lamp"), ("a car", "a plant"), ("a table", "a horse"))
MIXED = (("a red armchair", "a blue armchair"), ("a table", "a bed"), ("an armchair", "a lamp"))
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def starter(pipeline: GaussianAtlasPipeline) -> torch.Tensor:
    """Seed 0 of each of GALLERY."""
    pictures = [_draw(pipeline(prompt, seed=0).gaussians[0], SIZE) for prompt in GALLERY]
    return torch.cat([torch.cat(pictures[start : start + COLUMNS], dim=1) for start in range(0, len(pictures), COLUMNS)])


def variations(pipeline: GaussianAtlasPipeline) -> torch.Tensor:
    """Seed 0 of each of VARIED, then its variations by seed 1 over STRENGTHS, then seed 1 alone."""
    rows = []
    for prompt in VARIED:
        source = pipeline(prompt, seed=0)
        varied = [pipeline(prompt, seed=1, init_atlas=source.atlases[0], strength=strength) for strength in (*STRENGTHS, 1.0)]
        rows.append([output.gaussians[0] for output in (source, *varied)])
    return _table(rows)


def inpainting(pipeline: GaussianAtlasPipeline) -> torch.Tensor:
    """Each object, what is kept of it, and the upper half made anew with its own prompt and with another, both by seed 1."""
    rows = []
    for prompt, other in INPAINTED:
        source = pipeline(prompt, seed=0)
        gaussians, size = source.gaussians[0], pipeline.layout.size
        upper = gaussians.means[:, 2] > gaussians.means[:, 2].quantile(UPPER)
        mask = upper.reshape(size, size)
        anew = [pipeline(text, seed=1, init_atlas=source.atlases[0], mask=mask).gaussians[0] for text in (prompt, other)]
        rows.append([gaussians, gaussians[~upper], *anew])
    return _table(rows)


def morphs(pipeline: GaussianAtlasPipeline) -> torch.Tensor:
    """Five frames between two objects."""
    rows = []
    for pair in MORPHED:
        first, second = (pipeline(prompt, seed=0).gaussians[0] for prompt in pair)
        rows.append([morph(first, second, share) for share in SHARES])
    return _table(rows)


def mix(pipeline: GaussianAtlasPipeline) -> torch.Tensor:
    """Two prompts, seed 0, mixed by SHARES."""
    return _table(
        [[pipeline(one, seed=0, mix_prompt=other, mix_weight=share).gaussians[0] for share in SHARES] for one, other in MIXED],
    )


PICTURES = {"starter": starter, "variations": variations, "inpainting": inpainting, "morph": morphs, "mix": mix}


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        sys.exit(f"unknown picture {unknown[0]!r}; choose from {', '.join(PICTURES)}")
    pipeline = GaussianAtlasPipeline.from_pretrained(ROOT / "models" / "starter")
    for name in names or PICTURES:
        output = ROOT / "docs" / "images" / f"{name}.png"
        output.parent.mkdir(exist_ok=True)
        save_png(PICTURES[name](pipeline), output)
        print(f"{output.relative_to(ROOT)}, {output.stat().st_size / 1000:.0f} kB: {PICTURES[name].__doc__}")


def _table(rows: list[list]) -> torch.Tensor:
    return torch.cat([torch.cat([_draw(gaussians, SMALL) for gaussians in row], dim=1) for row in rows])


def _draw(gaussians, size: int) -> torch.Tensor:
    return render(gaussians, Cameras.orbit(1, size)).rgb[0]


if __name__ == "__main__":
    main(sys.argv[1:])
