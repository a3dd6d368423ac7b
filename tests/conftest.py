"""Blender for the tests: the extension runs as users have it, `bl_ext.user_default.gaussian_atlas`.

With GAUSSIAN_ATLAS_EXTENSION_ZIP the tests install and use that zip instead of the checkout.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.rendering import painted_torus

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    # Before anything imports bpy: Blender reads it once. Other tests may use bpy without the extension.
    config.blender_user_folder = tempfile.mkdtemp(prefix="gaussian-atlas-tests-")
    os.environ["BLENDER_USER_RESOURCES"] = config.blender_user_folder


def pytest_unconfigure(config):
    shutil.rmtree(config.blender_user_folder, ignore_errors=True)


def _tool(name: str):
    spec = importlib.util.spec_from_file_location(f"gaussian_atlas_tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    """A test that leaves torch's global switches changed fails itself, instead of every one after it."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        enabled, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        assert enabled and dtype == torch.float32, "gradients were left off, or the default type changed"


@pytest.fixture(scope="session")
def blender(request):
    """bpy with the extension enabled in a user folder of the tests' own."""
    if importlib.util.find_spec("bpy") is None:
        pytest.skip("the bpy module is not installed")
    archive = os.environ.get("GAUSSIAN_ATLAS_EXTENSION_ZIP")
    _tool("blender").start(Path(request.config.blender_user_folder), Path(archive).resolve() if archive else None)
    import bpy

    return bpy


@pytest.fixture(scope="session")
def extension(blender):
    """The extension's modules by path: extension("blender_addon.job") is the module that Blender runs."""

    def module(path: str):
        return importlib.import_module(f"bl_ext.user_default.gaussian_atlas.{path}")

    return module


@pytest.fixture
def bpy(blender):
    """bpy with an empty scene; the file, the loaded model and the render settings of earlier tests are gone."""
    blender.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    yield blender
    importlib.import_module("bl_ext.user_default.gaussian_atlas.blender_addon.service").set_pipeline_factory()


@pytest.fixture
def torus(extension):
    """torus(count=4096, seed=0): fairly opaque, flat Gaussians on a painted torus, an object of the project's frame."""
    return functools.partial(painted_torus, extension)


class FakePipeline:
    """Stands in for the model: a ring whose size and colours follow prompt and seed, after `num_inference_steps` steps."""

    def __init__(self, torus):
        self.torus = torus
        self.calls = []
        self.layout, self.low_pass = SimpleNamespace(id="fake", count=196, size=14), 0.0
        self.notes = []  # what the result says, such as that a prompt was cut
        self.before_step = lambda step: None  # a test may wait, cancel or raise here

    def __call__(self, prompt, *, seed, num_inference_steps, callback, cancel, **others):
        self.calls.append({"prompt": prompt, "seed": seed, "num_inference_steps": num_inference_steps} | others)
        for step in range(num_inference_steps):
            if cancel.is_set():
                raise self.cancelled("stopped")
            self.before_step(step)
            callback(step + 1, num_inference_steps, lambda step=step: [self.torus(50, seed=step)])
        return SimpleNamespace(gaussians=[self.torus(200, seed=len(prompt) + seed)], notes=self.notes)


@pytest.fixture
def fake_model(bpy, extension, torus, tmp_path):
    """A model folder that the preferences point at and the pipeline it gives: generation in milliseconds.

    `fake_model.pipeline` is the pipeline, `fake_model.folder` the folder, `fake_model.loads` counts how often it was loaded.
    """
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "bundle.json").write_text('{"name": "fake", "version": "1.2"}')
    fake = SimpleNamespace(folder=folder, pipeline=FakePipeline(torus), loads=0)
    fake.pipeline.cancelled = extension("generator.errors").Cancelled

    def load(path, device):
        assert path == folder.resolve()
        fake.loads += 1
        fake.device = device
        return fake.pipeline

    extension("blender_addon.service").set_pipeline_factory(load)
    preferences = bpy.context.preferences.addons[extension("blender_addon.extension").PACKAGE].preferences
    preferences.model_path = str(folder)
    yield fake
    preferences.model_path = ""
