"""Transport of an object to the sphere: the fast solver beside the exact one, POT's `ot.emd`, in one run."""

from __future__ import annotations

import numpy as np
import ot
from _report import report, seconds

from generator.atlas.layout import fibonacci_sphere
from generator.model.pipeline import GaussianAtlasPipeline
from trainer.transport import assign

PROMPTS = ("an armchair", "a lamp", "a car", "a plant")


def emd(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Squared-distance transport with uniform weights; the target of each point."""
    return ot.emd([], [], ot.dist(points, targets), numItermax=10_000_000).argmax(1)


def main() -> None:
    pipeline = GaussianAtlasPipeline.from_pretrained("models/starter")
    random = np.random.default_rng(0)
    rows = []
    for prompt in PROMPTS:
        means = pipeline(prompt, seed=0).gaussians[0].means.double().numpy()
        for count in (1024, 4096):
            points = means[random.permutation(len(means))[:count]]
            sphere = fibonacci_sphere(count).double().numpy()
            exact = emd(points, sphere)
            exact_cost = ((points - sphere[exact]) ** 2).sum(1).mean()
            fast = assign(points, sphere, "fast")
            exact_seconds = seconds(lambda points=points, sphere=sphere: emd(points, sphere), repeats=1)
            fast_seconds = seconds(lambda points=points, sphere=sphere: assign(points, sphere, "fast"), repeats=3)
            rows.append(
                {
                    "object": prompt,
                    "N": count,
                    "ot.emd s": exact_seconds,
                    "fast s": fast_seconds,
                    "seconds ratio": fast_seconds / exact_seconds,
                    "cost above exact %": 100 * (fast.cost / exact_cost - 1),
                    "certified gap %": 100 * (fast.cost / fast.lower_bound - 1),
                }
            )
    report("transport", rows, "Centres of generated objects to the Fibonacci sphere; mean squared distance")


if __name__ == "__main__":
    main()
