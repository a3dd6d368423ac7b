"""Every backend against the reference that writes the equations out, forward and backward."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from generator.errors import InputError
from generator.gaussians import Gaussians
from generator.render import Cameras, compiled, cpu, reference, render, save_png

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = (compiled, cpu)


def cloud(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    return Gaussians(
        means=uniform(count, 3) - 0.5,
        quaternions=torch.nn.functional.normalize(uniform(count, 4) - 0.5, dim=1),
        scales=0.01 + 0.06 * uniform(count, 3),
        opacities=uniform(count),
        colors=uniform(count, 3),
    ).to(dtype)


def frame_filling(count: int, seed: int = 0) -> Gaussians:
    """Gaussians all over and beyond the frame, behind the camera too, some large, some hardly opaque, some far too long."""
    gaussians = cloud(count, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    factor = torch.exp(2 * torch.randn(count, 3, generator=generator).clamp(-2, 1))
    return gaussians.replace(means=6 * gaussians.means, scales=gaussians.scales * factor)


SCENES = {
    "one": (cloud(1), Cameras.orbit(2, 32, radius=2.4)),
    "cloud": (cloud(300), Cameras.orbit(2, 64, radius=2.4)),
    "odd size": (cloud(80, 2), dataclasses.replace(Cameras.orbit(2, 45), width=45, height=29)),
    "beyond the frame": (frame_filling(250, 4), Cameras.orbit(2, 48)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scene", SCENES)
def test_backends_equal_the_reference(backend, scene):
    gaussians, cameras = SCENES[scene]
    *images, means2d, radii = backend.render_views(gaussians, cameras)
    for image, expected in zip(images, reference.render_views(gaussians.to(torch.float64), cameras), strict=True):
        # The 1/255 cut is a step: rounding may decide it differently for single pairs.
        error = (image - expected).abs() / expected.abs().amax().clamp_min(1)
        assert error.max() < 5e-3 and error.mean() < 2e-5
    assert means2d.shape == (2, len(gaussians), 2) and radii.shape == (2, len(gaussians))


def test_backends_see_the_same_splats():
    for gaussians, cameras in SCENES.values():
        (*_, ours, our_radii), (*_, theirs, their_radii) = (backend.render_views(gaussians, cameras) for backend in BACKENDS)
        seen = their_radii > 0
        assert torch.equal(our_radii > 0, seen)
        torch.testing.assert_close(ours[seen], theirs[seen], atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(our_radii, their_radii, atol=1e-3, rtol=1e-4)


def test_bands_do_not_change_the_picture(monkeypatch):
    gaussians, cameras = cloud(200), Cameras.orbit(1, 48)
    whole = render(gaussians, cameras)
    monkeypatch.setattr(cpu, "PAIRS_AT_ONCE", 500)
    banded = render(gaussians, cameras)
    for a, b in zip(whole, banded, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_without_a_background_colours_stay_multiplied_by_alpha():
    gaussians, cameras = cloud(50), Cameras.orbit(2, 24)
    bare, white = render(gaussians, cameras, background=None), render(gaussians, cameras)
    torch.testing.assert_close(bare.rgb + (1 - bare.alpha[..., None]), white.rgb)


def test_background_shows_where_nothing_is_and_depth_is_the_distance():
    one = cloud(1).replace(means=torch.zeros(1, 3), scales=torch.full((1, 3), 0.1), opacities=torch.ones(1))
    view = render(one, Cameras.orbit(1, 65, radius=2.0), background=(0.2, 0.4, 0.6))
    assert torch.allclose(view.rgb[0, 0, 0], torch.tensor([0.2, 0.4, 0.6]))
    assert torch.allclose(view.rgb[0, 32, 32], one.colors[0], atol=2e-3)
    assert view.depth[0, 32, 32] == pytest.approx(2.0, abs=1e-3) and view.depth[0, 0, 0] == 0


def test_a_picture_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    from PIL import Image

    path = tmp_path / "a.png"
    save_png(torch.full((2, 3, 3), 0.5), path)
    before = path.read_bytes()
    assert np.asarray(Image.open(path)).tolist() == [[[128] * 3] * 3] * 2
    with pytest.raises(InputError, match="none does not exist; make it first"):
        save_png(torch.zeros(2, 3, 3), tmp_path / "none" / "a.png")

    def fail(_image, temporary, **_):
        Path(temporary).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        save_png(torch.zeros(2, 3, 3), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_behind_the_camera_and_empty_sets_render_nothing():
    behind = cloud(20)
    cameras = Cameras.orbit(1, 16)
    shifted = behind.replace(means=behind.means + 10 * cameras.positions[0])
    assert render(shifted, cameras).alpha.max() == 0
    assert render(behind[:0], cameras).alpha.max() == 0


def test_cameras_look_at_the_origin_with_z_up():
    cameras = Cameras.orbit(3, 100, elevation=15)
    homogeneous = cameras.viewmats @ torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert torch.allclose(homogeneous[:, :2], torch.zeros(3, 2), atol=1e-6) and (homogeneous[:, 2] > 0).all()
    above = cameras.viewmats @ torch.tensor([0.0, 0.0, 0.1, 1.0])
    assert (above[:, 1] < 0).all(), "+Z of the object must point up in the picture (-Y of the camera)"
    front = Cameras.orbit(1, 10, start=0.0).positions[0]
    assert front[1] < 0 and abs(front[0]) < 1e-6, "azimuth 0 looks at the front, which is -Y"
    assert math.isclose(front.norm(), Cameras.orbit(1, 10).positions[0].norm(), rel_tol=1e-6)


NAMES = ("means", "quaternions", "scales", "opacities", "colors")


def gradients(gaussians: Gaussians, cameras: Cameras, draw, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Of a random weighting of rgb, alpha and depth, by every field."""
    generator = torch.Generator().manual_seed(1)
    leaves = {name: getattr(gaussians, name).detach().to(dtype).requires_grad_() for name in NAMES}
    images = draw(Gaussians(**leaves), cameras)[:3]
    sum((image * torch.rand(image.shape, generator=generator).to(dtype)).sum() for image in images).backward()
    return {name: leaf.grad.double() for name, leaf in leaves.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scene", SCENES)
def test_gradients_equal_the_reference(backend, scene):
    gaussians, cameras = SCENES[scene]
    gaussians = gaussians[:60]
    fast = gradients(gaussians, cameras, backend.render_views)
    exact = gradients(gaussians, cameras, reference.render_views, torch.float64)
    for name in NAMES:
        error = (fast[name] - exact[name]).norm() / exact[name].norm()
        assert error < 2e-3, f"gradient of {name} is off by {error:.2e}"


def test_gradients_are_those_of_finite_differences():
    """The reference itself, in float64, against the slope of its pictures; no alpha near the cut or the bound, which are steps."""
    gaussians, cameras = cloud(3, 7), Cameras.orbit(1, 12, radius=2.0)
    gaussians = gaussians.replace(scales=gaussians.scales + 0.5, opacities=gaussians.opacities * 0.5 + 0.2).to(torch.float64)

    def draw(*fields):
        return reference.render_views(Gaussians(*fields), cameras)

    assert torch.autograd.gradcheck(draw, tuple(getattr(gaussians, name).requires_grad_() for name in NAMES), atol=1e-5)


def test_threads_do_not_change_the_result():
    gaussians, cameras = SCENES["cloud"]
    several, before = gradients(gaussians, cameras, compiled.render_views), numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = gradients(gaussians, cameras, compiled.render_views)
    finally:
        numba.set_num_threads(before)
    assert all(torch.equal(one[name], several[name]) for name in NAMES)


def test_drawing_leaves_torch_its_threads():
    code = (
        "import torch; from generator.gaussians import Gaussians; from generator.render import Cameras, render; torch.set_num_threads(1);"
        "g = Gaussians(*(torch.rand(9, n) for n in (3, 4, 3)), torch.rand(9), torch.rand(9, 3));"
        "g = g.replace(means=g.means.requires_grad_()); render(g, Cameras.orbit(1, 16)).rgb.sum().backward();"
        "import numba; assert numba.threading_layer(); assert torch.get_num_threads() == 1, torch.get_num_threads()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_positional_gradients_are_there_for_densification():
    gaussians, cameras = SCENES["cloud"]
    gaussians = gaussians.replace(means=gaussians.means.clone().requires_grad_())
    view = render(gaussians, cameras)
    view.means2d.retain_grad()
    view.rgb.square().sum().backward()
    assert view.means2d.grad.shape == (2, 300, 2) and view.means2d.grad.abs().sum() > 0
    assert (view.means2d.grad[view.radii == 0] == 0).all()


def test_equal_depths_are_drawn_in_the_order_of_the_input():
    """Two discs at one place: which one is in front is told by the order alone, alike in every backend."""
    pair = cloud(1)[torch.zeros(2, dtype=torch.int64)]
    pair = pair.replace(colors=torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), opacities=torch.tensor([0.9, 0.9]))
    for draw in (compiled.render_views, cpu.render_views, reference.render_views):
        rgb = draw(pair, Cameras.orbit(1, 32, radius=2.4))[0].amax((0, 1, 2))
        assert rgb[0] > 3 * rgb[1]


def test_one_preview_does_not_load_numba():
    """It would take longer than the picture; Blender has none."""
    code = (
        "import sys, torch; from generator.gaussians import Gaussians; from generator.render import Cameras, render;"
        "g = Gaussians(torch.zeros(1, 3), torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), 0.1), torch.ones(1), torch.ones(1, 3));"
        "render(g, Cameras.orbit(1, 16)); assert 'numba' not in sys.modules;"
        "render(g.replace(colors=torch.ones(1, 3, requires_grad=True)), Cameras.orbit(1, 16)).rgb.sum().backward();"
        "assert 'numba' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_another_name_of_the_package_compiled_is_not_left_for_this_one(tmp_path):
    """In Blender the same files are bl_ext....generator; numba's cache, which lies beside them, names modules."""
    shutil.copytree(ROOT / "generator", tmp_path / "elsewhere" / "generator", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "elsewhere" / "__init__.py").touch()
    code = """
import importlib, torch
module = lambda name: importlib.import_module(f"{PACKAGE}.{name}")
gaussians = module("gaussians").Gaussians(torch.zeros(1, 3), torch.eye(4)[:1], torch.full((1, 3), 0.1), torch.ones(1), torch.ones(1, 3))
views = module("render.compiled").render_views(gaussians, module("render").Cameras.orbit(count=1, size=16))
assert views[1].max() > 0.5
"""
    for place, package in ((tmp_path, "elsewhere.generator"), (tmp_path / "elsewhere", "generator")):
        child = f"import sys; sys.path.insert(0, {str(place)!r}); PACKAGE = {package!r}{code}"
        subprocess.run([sys.executable, "-c", child], cwd=place, check=True)


def test_without_numba_torch_alone_gives_the_gradients(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    gaussians, cameras = SCENES["cloud"]
    colors = gaussians.colors.clone().requires_grad_()
    render(gaussians.replace(colors=colors), cameras).rgb.sum().backward()
    assert colors.grad.abs().sum() > 0
