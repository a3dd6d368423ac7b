"""A generated object in Cycles against the CPU renderer of the same Gaussians: decibels and seconds, one sample a pixel."""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from pathlib import Path

from _report import report

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tools"), str(ROOT / "tests")]

from blender import MODULE, start  # noqa: E402
from test_render_fidelity import psnr, render_in_blender  # noqa: E402

PROMPTS = ("a red armchair", "a lamp", "a car", "a plant")


def main() -> None:
    def extension(path: str):
        return importlib.import_module(f"{MODULE}.{path}")

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        start(Path(folder) / "user")
        import bpy

        pipeline = extension("generator.model.pipeline").GaussianAtlasPipeline.from_pretrained(ROOT / "models" / "starter")
        render = extension("generator.render")
        for prompt in PROMPTS:
            gaussians = pipeline(prompt, seed=0).gaussians[0]
            cameras = render.Cameras.orbit(count=1, size=256)
            expected = render.render(gaussians, cameras).rgb[0].numpy()
            for display_blending, face_camera in ((True, True), (False, True), (True, False)):
                bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
                object = extension("blender_addon.splat_object").write(gaussians)
                begin = time.perf_counter()
                image = render_in_blender(bpy, extension, object, cameras, Path(folder) / "view.png", display_blending, face_camera)
                rows.append(
                    {
                        "prompt": prompt,
                        "drawn as": "camera-facing squares" if face_camera else "ellipsoids",
                        "view": "Raw, blended in display space" if display_blending else "Standard, blended in linear light",
                        "PSNR dB": psnr(image, expected),
                        "Cycles s": time.perf_counter() - begin,
                    }
                )
    report("fidelity", rows, "Generated objects, 256 x 256, one sample; reference: the CPU renderer (EWA, display space)")


if __name__ == "__main__":
    main()
