"""How few paths a pixel needs: views of real objects against the same ones at 256 paths, seconds and decibels on object pixels."""

from __future__ import annotations

import argparse
import time

from _report import report
from transport import OBJECTS

from trainer.fit import psnr
from trainer.sources import SWEET_HOME_3D, open_source
from trainer.views import Views, ViewSettings, render_object

REFERENCE = 256  # paths a pixel
SAMPLES = (1, 4, 16, 64)


def decibels(views: Views, reference: Views) -> float:
    """PSNR on white over the pixels that the reference covers."""
    covered = reference.rgba[..., 3] > 0
    return psnr(((views.composite() - reference.composite())[covered] ** 2).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256, help="pixels, image side (default: 256)")
    parser.add_argument("--views", type=int, default=6, help="cameras round each object (default: 6)")
    options = parser.parse_args()
    sources = {source.id: source for source in open_source(SWEET_HOME_3D, "runs/sources") if source.id in OBJECTS}
    rows = []
    for name in OBJECTS:

        def draw(samples: int, count: int = options.views, name: str = name) -> tuple[Views, float]:
            settings = ViewSettings(train=count, held_out=0, size=options.size, samples=samples)
            start = time.perf_counter()
            return render_object(sources[name], settings), time.perf_counter() - start

        draw(1, 1)  # Blender's start and the mesh's first reading are no matter of samples
        reference, seconds = draw(REFERENCE)
        row = {"object": name, f"{REFERENCE}: s a view": seconds / options.views}
        for samples in SAMPLES:
            views, seconds = draw(samples)
            row |= {f"{samples}: s": seconds / options.views, f"{samples}: dB": decibels(views, reference)}
        rows.append(row)
    report("views", rows, f"{options.views} views of {options.size} px, Cycles on one core, reading the mesh included")


if __name__ == "__main__":
    main()
