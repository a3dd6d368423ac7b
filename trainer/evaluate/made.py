"""What is evaluated: objects made for prompts, by one of our bundles or by any method that left files."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from generator.errors import InputError
from generator.formats import SUFFIXES, load
from generator.gaussians import Gaussians
from generator.model.pipeline import GaussianAtlasPipeline
from generator.render import Cameras
from trainer.captions import visible_areas
from trainer.sources.objects import slug

from .judge import draw
from .prompts import Prompt, own_prompts

MESHES = (".glb",)
_SAMPLES = 16  # paths per pixel of a mesh's picture
_TAIL = 0.005  # of the surface at each end of an axis, which does not count for the size of an object


@dataclass(frozen=True)
class Made:
    """One object."""

    prompt: Prompt
    seed: int  # or the number of the file among those of its prompt
    gaussians: Gaussians | None  # object frame, unit box; None for a mesh
    mesh: Path | None = None

    def pictures(self, cameras: Cameras) -> tuple[Tensor, Tensor]:
        """Pictures [V, 3, H, W] over white in 0..1, and their alphas [V, H, W]."""
        if self.gaussians is None:
            assert self.mesh is not None  # an object is one or the other
            return _draw_mesh(self.mesh, cameras)
        finite = self.gaussians[self.gaussians.finite()]
        if not len(finite):
            shape = (len(cameras), cameras.height, cameras.width)
            return torch.ones(shape[0], 3, *shape[1:]), torch.zeros(shape)
        return draw(finite, cameras)


def made_by_bundle(pipeline: GaussianAtlasPipeline, prompts: Sequence[Prompt], seeds: int, steps: int | None = None) -> Iterator[Made]:
    """`seeds` objects for each prompt, seed 0 and up."""
    for prompt in prompts:
        result = pipeline(prompt.text, num_samples_per_prompt=seeds, num_inference_steps=steps)
        for seed, gaussians in zip(result.seeds, result.gaussians, strict=True):
            yield Made(prompt, seed, gaussians)


def made_by_files(folder: str | Path, prompts: Sequence[Prompt] | None = None, up: str | None = None) -> tuple[list[Made], list[str]]:
    """The splats and meshes of a folder, named by their prompts: "a red chair.ply", "a-red-chair-2.spz", "a_red_chair_7.glb".

    Only letters and digits count, and a number at the end stands for the seed. Objects are brought to the unit box by their
    visible surface.

    Args:
        prompts: those to look for; by default the names themselves are the prompts.
        up: axes of the splats (formats.axes.UP); by default what a file states, else Z.

    Returns:
        The objects, and the prompts for which there is none.

    Raises:
        InputError: there is no file for any prompt, or one cannot be read.
    """
    files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (*SUFFIXES, *MESHES))
    if not files:
        raise InputError(f"{folder} holds no {', '.join((*SUFFIXES, *MESHES))} files")
    if prompts is None:
        prompts = own_prompts(_without_number(slug(path.stem)).replace("-", " ") for path in files)
    found: list[Made] = []
    missing = []
    for prompt in prompts:
        name = slug(prompt.text)
        # A prompt may itself end in a number.
        own = [path for path in files if slug(path.stem) == name or _without_number(slug(path.stem)) == name]
        for number, path in enumerate(own):
            if path.suffix.lower() in MESHES:
                found.append(Made(prompt, number, None, path))
            else:
                found.append(Made(prompt, number, to_unit_box(load(path, up))))
        if not own:
            missing.append(prompt.text)
    if not found:
        raise InputError(f"no file in {folder} is named by one of the prompts, such as {slug(prompts[0].text)}.ply")
    return found, missing


def to_unit_box(gaussians: Gaussians) -> Gaussians:
    """Centred and with a longest side of 1, by the box of all but the outermost 0.5 % of the visible surface on each side.

    Numbers that are not finite stay, and do not count.
    """
    finite = gaussians.finite()
    kept = gaussians[finite]
    if not len(kept):
        return gaussians
    areas = visible_areas(kept)
    lowest, highest = [], []
    for axis in kept.means.T:
        order = axis.argsort()
        share = areas[order].cumsum(0) / areas.sum().clamp_min(1e-12)
        inside = order[(share >= _TAIL) & (share <= 1 - _TAIL)]
        inside = inside if len(inside) else order
        lowest.append(axis[inside].min())
        highest.append(axis[inside].max())
    low, high = torch.stack(lowest), torch.stack(highest)
    side = (high - low).max().clamp_min(1e-9)
    return gaussians.replace(means=(gaussians.means - (low + high) / 2) / side, scales=gaussians.scales / side)


def _without_number(name: str) -> str:
    # The tail of six hexadecimal digits is what headless batches add to names that lost signs.
    return re.sub(r"(-[0-9a-f]{6})?-\d+$", "", name) or name


def _draw_mesh(path: Path, cameras: Cameras) -> tuple[Tensor, Tensor]:
    from trainer import scene
    from trainer.views import import_blender

    import_blender()
    with tempfile.TemporaryDirectory(prefix="mesh-") as folder, scene.quiet():
        scene.load_object(path)
        linear, _, _ = scene.render_cameras(cameras, Path(folder), _SAMPLES)
    rgba = torch.from_numpy(scene.straight_srgb(linear)).float() / 255
    alpha = rgba[..., 3]
    rgb = rgba[..., :3] * alpha[..., None] + 1 - alpha[..., None]
    return rgb.permute(0, 3, 1, 2), alpha
