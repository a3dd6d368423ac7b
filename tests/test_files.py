"""Import and export of splat files in Blender: several at once, dropped ones, axes, what is left out."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def formats(extension):
    return extension("generator.formats")


def test_several_files_at_once(bpy, torus, tmp_path, formats):
    folder = tmp_path / "drei Dateien"
    folder.mkdir()
    names = ["ring ä.ply", "ring.splat", "椅子.spz"]
    for count, name in enumerate(names, 10):
        formats.save(torus(count), folder / name)
    (folder / "text.ply").write_text("no splats here")
    files = [{"name": name} for name in [*names, "text.ply"]]
    assert bpy.ops.gaussian_atlas.import_splats(directory=str(folder), files=files) == {"FINISHED"}, "the good ones are kept"
    objects = [o for o in bpy.context.scene.objects if o.type == "POINTCLOUD"]
    assert {o.name: len(o.data.points) for o in objects} == {"ring ä": 10, "ring": 11, "椅子": 12}
    assert all(o.select_get() for o in objects)
    with pytest.raises(RuntimeError, match=r"text\.ply"):
        bpy.ops.gaussian_atlas.import_splats(directory=str(folder), files=[{"name": "text.ply"}])


def test_a_path_beside_the_blend_file(bpy, torus, tmp_path, formats, extension):
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "scene.blend"))
    bpy.context.view_layer.objects.active = extension("blender_addon.splat_object").write(torus(5), "ring")
    bpy.ops.gaussian_atlas.export_splats(filepath="//ring.spz", spz_version="4")
    assert (tmp_path / "ring.spz").read_bytes()[:8] == b"NGSP\x04\0\0\0"
    assert bpy.ops.gaussian_atlas.import_splats(filepath="//ring.spz") == {"FINISHED"}


def test_dropped_files_come_to_the_importer(bpy):
    (handler,) = [cls for cls in bpy.types.FileHandler.__subclasses__() if cls.__name__ == "SplatFileHandler"]
    assert handler.is_registered
    assert handler.bl_import_operator == "gaussian_atlas.import_splats"
    assert handler.bl_file_extensions.split(";") == [".ply", ".splat", ".spz"]
    properties = bpy.ops.gaussian_atlas.import_splats.get_rna_type().properties
    assert {"directory", "files", "filepath"} <= set(properties.keys()), "what Blender fills in for dropped files"


@pytest.mark.parametrize("suffix", [".ply", ".splat", ".spz"])
@pytest.mark.parametrize("up", ["-Y", "Y"])
def test_exported_axes_come_back_upright(bpy, torus, tmp_path, formats, extension, suffix, up):
    splat_object = extension("blender_addon.splat_object")
    gaussians = torus(40)
    bpy.context.view_layer.objects.active = splat_object.write(gaussians, "ring")
    path = tmp_path / f"ring{suffix}"
    bpy.ops.gaussian_atlas.export_splats(filepath=str(path), up_axis=up)
    x, y, z = gaussians.means.numpy().T
    expected = np.stack([x, -z, y] if up == "-Y" else [x, z, -y], axis=1)
    assert np.allclose(formats.load(path, up="Z").means, expected, atol=1e-4), "the data are turned"
    # A .ply states its axes; for the others a person chooses.
    bpy.ops.gaussian_atlas.import_splats(filepath=str(path), **({} if suffix == ".ply" else {"up_axis": up}))
    object = bpy.context.active_object
    bpy.context.view_layer.update()
    assert np.allclose(splat_object.read(object).means, expected, atol=1e-4), "the object is turned back, not its data"
    assert np.allclose(splat_object.read(object, world=True).means, gaussians.means, atol=1e-4)


def test_what_is_left_out_is_said(bpy, tmp_path, capfd):
    from plyfile import PlyData, PlyElement

    names = ["x", "y", "z", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(45)), "opacity"]
    names += [*(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    table = np.full(3, 0.5, dtype=[(name, "f4") for name in names])
    PlyData([PlyElement.describe(table, "vertex")]).write(str(tmp_path / "scan.ply"))
    assert bpy.ops.gaussian_atlas.import_splats(filepath=str(tmp_path / "scan.ply")) == {"FINISHED"}
    assert "spherical harmonics of degree 3" in "".join(capfd.readouterr())
