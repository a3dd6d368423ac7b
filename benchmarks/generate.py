"""A prompt to Gaussians with the bundled model: seconds by stage, against the same model in float32."""

from __future__ import annotations

import resource
import statistics

import torch
from _report import report

from generator.model.pipeline import GaussianAtlasPipeline

PROMPT, REPEATS = "a red armchair", 5


def main() -> None:
    rows, reference = [], None
    for name, dtype in (("float32", torch.float32), ("as the bundle says", None)):
        pipeline = GaussianAtlasPipeline.from_pretrained("models/starter", device="cpu", dtype=dtype)
        pipeline(PROMPT)
        runs = [pipeline(PROMPT, seed=seed).seconds for seed in range(REPEATS)]
        stages = {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}
        total = sum(stages.values())
        reference = reference or total
        rows.append(
            {"precision": name, "dtype": str(pipeline.unet.dtype).removeprefix("torch."), "load s": pipeline.load_seconds}
            | {f"{stage} s": value for stage, value in stages.items()}
            | {"total s": total, "ratio": total / reference, "steps": 20, "Gaussians": pipeline.layout.count}
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    report("generate", rows, f"{PROMPT!r}, guidance 3.5, median of {REPEATS}; peak memory of this process {peak:.2f} GB")


if __name__ == "__main__":
    main()
