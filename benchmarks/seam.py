"""The seam of generated objects: how much the first and the last column of an atlas differ, beside adjacent ones.

In the model's normalised values, where every cell counts alike; 1 is an image that wraps without a seam.
"""

from __future__ import annotations

from dataclasses import replace

from _atlases import PROMPTS
from _report import report
from layouts import seam_step

from generator.model.pipeline import GaussianAtlasPipeline


def main() -> None:
    pipeline = GaussianAtlasPipeline.from_pretrained("models/starter")
    rows = []
    for prompt in PROMPTS:
        atlas = pipeline(prompt, seed=0).atlases[0]
        rows.append({"prompt": prompt, "seam step": seam_step(replace(atlas, values=pipeline.normalization.normalize(atlas.values)))})
    report("seam", rows, f"{pipeline.name}, seed 0")


if __name__ == "__main__":
    main()
