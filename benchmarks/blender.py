"""F12 of splat objects in Blender: decibels against the CPU renderer and seconds, by engine, display and Blender version.

    python benchmarks/blender.py [FITS] [--python PATH ...] [--engines CYCLES EEVEE] [--picture strip.png]

FITS is a folder of fitted .ply files; without it the objects are what the starter model generates. Every --python is a Python
with another version's bpy (and torch); this one is measured first. Beside our three displays stands the shader that other
add-ons ship: spheres whose alpha falls off with the cosine of the viewing angle, here at two standard deviations.

Each engine of each version runs in a process of its own: EEVEE aborts where there is no EGL driver, and is then left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from _report import report, seconds  # noqa: E402

PROMPTS = ("a red armchair", "a plant")
COSINE = "Cosine falloff, as others do"
MILLION = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fits", nargs="?", type=Path, help="folder of fitted .ply files; without it, objects of the starter model")
    parser.add_argument("--limit", type=int, default=3, help="files of the folder, spread over it (default: 3)")
    parser.add_argument("--python", type=Path, nargs="*", default=[], help="Pythons with other versions of bpy")
    parser.add_argument("--engines", nargs="*", default=["CYCLES", "EEVEE"], help="CYCLES, EEVEE (default: both)")
    parser.add_argument("--size", type=int, default=256, help="image side in pixels (default: 256)")
    parser.add_argument("--picture", type=Path, help="write the Cycles renders of this Python to this file, an object a row")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.child.write_text(json.dumps(measure(options)), encoding="utf-8")
        return
    rows, imports = [], []
    for python in (Path(sys.executable), *options.python):
        for engine in options.engines:
            with tempfile.TemporaryDirectory() as folder:
                result = Path(folder) / "rows.json"
                command = [str(python), __file__, "--child", str(result), "--engines", engine, "--size", str(options.size)]
                command += ["--limit", str(options.limit)] + ([str(options.fits)] if options.fits else [])
                command += ["--picture", str(options.picture)] if options.picture and python == Path(sys.executable) else []
                done = subprocess.run(command, stdout=subprocess.DEVNULL)
                if done.returncode < 0 and engine == "EEVEE":
                    print(f"{python}: EEVEE cannot start here: no EGL driver")
                    continue
                if done.returncode:
                    sys.exit(f"{python}: {engine} failed")
                measured = json.loads(result.read_text(encoding="utf-8"))
                rows += measured["renders"]
                imports += measured["imports"]
    size = options.size
    report("blender", rows, f"{size} x {size}, one sample, Raw view unless said; reference: the CPU renderer (EWA, display space)")
    if imports:
        report("blender_import", imports, f"{MILLION:,} splats in Blender, seconds")


def measure(options: argparse.Namespace) -> dict[str, list[dict]]:
    """The rows of one engine in this Python's Blender."""
    from tools.blender import MODULE, start

    def extension(path: str):
        return importlib.import_module(f"{MODULE}.{path}")

    with tempfile.TemporaryDirectory() as folder:
        start(Path(folder) / "user")
        renders = _renders(options, extension, Path(folder))
        return {"renders": renders, "imports": [_million(extension)] if options.engines == ["CYCLES"] else []}


def _renders(options: argparse.Namespace, extension, folder: Path) -> list[dict]:
    import bpy

    from tests.rendering import painted_torus, psnr, render_in_blender, translucent

    engines = bpy.types.RenderSettings.bl_rna.properties["engine"].enum_items
    is_cycles = options.engines == ["CYCLES"]
    engine = "CYCLES" if is_cycles else next(name for name in ("BLENDER_EEVEE", "BLENDER_EEVEE_NEXT") if name in engines)
    render, inputs = extension("generator.render"), extension("blender_addon.splat_object.inputs")
    objects = {"translucent torus": translucent(lambda count: painted_torus(extension, count), 16384)} | _objects(options, extension)
    # Display, whether values are blended in display space, density, name in the table.
    ways = [(display, True, 1.0, display) for display in inputs.DISPLAYS]
    standard = f"{inputs.CAMERA_QUADS}, Standard view"
    dense = extension("blender_addon.preview").DENSITY_BEFORE_WHITE
    ways += [(inputs.CAMERA_QUADS, False, 1.0, standard), (inputs.CAMERA_QUADS, False, dense, f"{standard}, density {dense:g}")]
    ways.append((inputs.ELLIPSOIDS, True, 1.0, COSINE))
    cameras = render.Cameras.orbit(count=5, size=options.size, elevation=35.0)[3:4]
    rows, strips = [], []
    for name, gaussians in objects.items():
        expected = render.render(gaussians, cameras).rgb[0].numpy()
        images = {"Reference": expected}
        for display, display_blending, density, label in ways:
            bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
            object = extension("blender_addon.splat_object").write(gaussians)
            if label == COSINE:
                _use_cosine_falloff(extension, object)
            extension("blender_addon.splat_object.node_group").set_input(object, inputs.DENSITY, density)
            begin = time.perf_counter()
            image = render_in_blender(bpy, extension, object, cameras, folder / "view.png", display_blending, display, engine)
            images[label] = image
            rows.append(
                {
                    "Blender": bpy.app.version_string.split()[0],
                    "engine": "Cycles" if is_cycles else "EEVEE",
                    "object": name,
                    "Gaussians": len(gaussians),
                    "drawn as": label,
                    "PSNR dB": round(psnr(image, expected), 1),
                    "s": time.perf_counter() - begin,
                }
            )
        strips.append([images[label] for label in ("Reference", *inputs.DISPLAYS, COSINE)])
    if options.picture and is_cycles:
        _save_strips(options.picture, strips)
    return rows


def _objects(options: argparse.Namespace, extension) -> dict:
    if options.fits is None:
        pipeline = extension("generator.model.pipeline").GaussianAtlasPipeline.from_pretrained(ROOT / "models" / "starter")
        return {prompt: pipeline(prompt, seed=0).gaussians[0] for prompt in PROMPTS}
    paths = sorted(options.fits.glob("*.ply"))
    chosen = [paths[i * len(paths) // options.limit] for i in range(min(options.limit, len(paths)))]
    return {path.stem: extension("generator.formats").load(path) for path in chosen}


def _use_cosine_falloff(extension, object) -> None:
    """Exchange the alpha of the ellipsoids' material: opacity times the cosine between the surface's normal and the view."""
    material, tree = extension("blender_addon.splat_object.material"), extension("blender_addon.splat_object.tree")
    node_group, inputs = (extension(f"blender_addon.splat_object.{name}") for name in ("node_group", "inputs"))
    node_group.set_input(object, inputs.SPLAT_SIZE, 2 / 3.2)  # our spheres reach to about 3.2 standard deviations
    nodes = material.ellipsoid().node_tree
    t = tree.Tree(nodes)
    mix = next(node for node in nodes.nodes if node.bl_idname == "ShaderNodeMixShader")
    geometry = t.node("ShaderNodeNewGeometry")
    point = t.node("ShaderNodeTexCoord").outputs["Object"]
    normal = t.node("ShaderNodeVectorTransform", {0: point}, vector_type="NORMAL", convert_from="OBJECT", convert_to="WORLD").outputs[0]
    cosine = t.math("MAXIMUM", t.vector("DOT_PRODUCT", t.vector("NORMALIZE", normal), geometry.outputs["Incoming"]), 0.0)
    opacity = t.node("ShaderNodeAttribute", attribute_type="INSTANCER", attribute_name="radiance:base").outputs["Alpha"]
    front = t.math("SUBTRACT", 1.0, geometry.outputs["Backfacing"])
    t.set(mix.inputs[0], t.math("MULTIPLY", t.math("MULTIPLY", opacity, cosine), front))


def _save_strips(path: Path, strips: list[list]) -> None:
    import numpy as np
    from PIL import Image

    picture = np.concatenate([np.concatenate(images, axis=1) for images in strips]).clip(0, 1)
    Image.fromarray((picture * 255).round().astype(np.uint8)).quantize(256).save(path, optimize=True)


def _million(extension) -> dict:
    """Seconds to make a splat object of a million Gaussians, to read it back, and to show it."""
    import bpy
    import torch

    random = torch.Generator().manual_seed(0)
    splat_object, inputs = extension("blender_addon.splat_object"), extension("blender_addon.splat_object.inputs")
    gaussians = extension("generator.gaussians").Gaussians(
        means=torch.rand(MILLION, 3, generator=random) - 0.5,
        quaternions=torch.nn.functional.normalize(torch.randn(MILLION, 4, generator=random), dim=1),
        scales=0.0005 + 0.002 * torch.rand(MILLION, 3, generator=random),
        opacities=torch.rand(MILLION, generator=random),
        colors=torch.rand(MILLION, 3, generator=random),
    )
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    row = {"Blender": bpy.app.version_string.split()[0]}

    def write() -> None:
        for cloud in list(bpy.data.pointclouds):
            bpy.data.pointclouds.remove(cloud)
        splat_object.write(gaussians)

    row["write"] = seconds(write, repeats=3)
    object = bpy.data.objects[-1]
    row["read"] = seconds(lambda: splat_object.read(object), repeats=3)
    modifier = extension("blender_addon.splat_object.node_group").modifier_of(object)

    def show() -> None:
        object.update_tag()
        graph = bpy.context.evaluated_depsgraph_get()
        sum(1 for _ in graph.object_instances)

    for display in (inputs.POINTS, inputs.ELLIPSOIDS):
        inputs.set_value(modifier, inputs.VIEWPORT_DISPLAY, display)
        row[f"nodes and instances, {display}"] = seconds(show, repeats=3)
    return row


if __name__ == "__main__":
    main()
