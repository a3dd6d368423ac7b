"""The materials of a splat: the exact Gaussian along each viewing ray, for Cycles and EEVEE."""

from __future__ import annotations

import bpy

from .layout import RADIANCE
from .tree import Tree

ELLIPSOID = "Gaussian Splat"
FACING = "Gaussian Splat Facing Camera"
DOT = "Gaussian Splat Point"
# Set by the node group: what the splat emits, scene-linear, and in its alpha the density. Groups from before there was one leave 1 there.
EMISSION = "splat_emission"
# Of the nodes of all three. Raise it with every change to them: what older files hold is then made anew in its place.
VERSION = 2
_VERSION = "gaussian_splats_version"
# As in the generator's renderer: a splat never hides everything behind it, and ends where its alpha falls below 1/255.
ALPHA_MAX = 0.999
ALPHA_MIN = 1 / 255


def ellipsoid() -> bpy.types.Material:
    """The material of this file for unit spheres that instances stretch to ellipsoids, made on first use.

    The sphere's surface is where the splat's alpha falls to 1/255, at k = sqrt(2 ln(255 o)) standard deviations. With
    p a point of the ray and i its unit direction, both in the sphere's frame, the squared distance of the ray from the
    centre is d2 = |p|^2 - (p.i)^2, and the Gaussian's peak along the ray is alpha = o exp(-k^2 d2 / 2) = o (255 o)^(-d2).
    """
    material = _found(ELLIPSOID)
    if material is not None:
        return material
    material, t = _new(ELLIPSOID)
    point = t.node("ShaderNodeTexCoord").outputs["Object"]
    geometry = t.node("ShaderNodeNewGeometry")
    ray = t.node(
        "ShaderNodeVectorTransform", {0: geometry.outputs["Incoming"]}, vector_type="VECTOR", convert_from="WORLD", convert_to="OBJECT"
    )
    along = t.vector("DOT_PRODUCT", point, t.vector("NORMALIZE", ray.outputs[0]))
    distance2 = t.math("SUBTRACT", t.vector("DOT_PRODUCT", point, point), t.math("MULTIPLY", along, along))
    # A ray enters and leaves the sphere: only the entry counts.
    return _finish(material, t, distance2, t.math("SUBTRACT", 1.0, geometry.outputs["Backfacing"]))


def facing() -> bpy.types.Material:
    """The material of this file for squares that face the camera: d2 is the squared distance in the square's own plane."""
    material = _found(FACING)
    if material is not None:
        return material
    material, t = _new(FACING)
    point = t.node("ShaderNodeTexCoord").outputs["Object"]
    return _finish(material, t, t.vector("DOT_PRODUCT", point, point), 1.0)


def dot() -> bpy.types.Material:
    """The material of this file for points: opaque, in the splat's colour."""
    material = _found(DOT)
    if material is not None:
        return material
    material, t = _new(DOT)
    emission = t.node("ShaderNodeAttribute", attribute_type="GEOMETRY", attribute_name=EMISSION).outputs["Color"]
    glow = t.node("ShaderNodeEmission", {"Color": emission, "Strength": 1.0}).outputs[0]
    t.node("ShaderNodeOutputMaterial", {"Surface": glow})
    t.arrange()
    return material


def _own(name: str) -> bpy.types.Material | None:
    return next((material for material in bpy.data.materials if material.name == name and material.library is None), None)


def _found(name: str) -> bpy.types.Material | None:
    material = _own(name)
    return material if material is not None and material.get(_VERSION, 1) == VERSION else None


def _new(name: str) -> tuple[bpy.types.Material, Tree]:
    """A material without nodes: this file's older one of that name, so that what shows it shows the new one, or else another."""
    material = _own(name) or bpy.data.materials.new(name)
    material[_VERSION] = VERSION
    if material.node_tree is None:
        material.use_nodes = True  # the default, and deprecated, from Blender 5.0
    if name != DOT:
        material.surface_render_method = "BLENDED"  # EEVEE sorts by instance centre, as splat renderers do
    material.use_backface_culling = name == ELLIPSOID
    if hasattr(material, "cycles"):
        material.cycles.emission_sampling = "NONE"  # thousands of tiny lamps would only add noise
    material.node_tree.nodes.clear()
    return material, Tree(material.node_tree)


def _finish(
    material: bpy.types.Material, t: Tree, distance2: bpy.types.NodeSocket, weight: bpy.types.NodeSocket | float
) -> bpy.types.Material:
    """Transparent and Emission mixed by the Gaussian's alpha, of which a density d makes that of d splats one behind the other."""
    own = t.node("ShaderNodeAttribute", attribute_type="INSTANCER", attribute_name=EMISSION).outputs
    emission, density = own["Color"], own["Alpha"]
    opacity = t.node("ShaderNodeAttribute", attribute_type="INSTANCER", attribute_name=RADIANCE).outputs["Alpha"]
    falloff = t.math("POWER", t.math("DIVIDE", opacity, ALPHA_MIN), t.math("MULTIPLY", distance2, -1.0))
    alpha = t.math("MINIMUM", t.math("MULTIPLY", opacity, falloff), ALPHA_MAX)
    alpha = t.math("SUBTRACT", 1.0, t.math("POWER", t.math("SUBTRACT", 1.0, alpha), density))
    alpha = t.math("MULTIPLY", t.math("MULTIPLY", alpha, t.math("LESS_THAN", distance2, 1.0)), weight)
    clear = t.node("ShaderNodeBsdfTransparent").outputs[0]
    glow = t.node("ShaderNodeEmission", {"Color": emission, "Strength": 1.0}).outputs[0]
    mixed = t.node("ShaderNodeMixShader", {0: alpha, 1: clear, 2: glow}).outputs[0]
    t.node("ShaderNodeOutputMaterial", {"Surface": mixed})
    t.arrange()
    return material
