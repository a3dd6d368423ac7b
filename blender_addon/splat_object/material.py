"""The material of a splat: the exact Gaussian along each viewing ray, for Cycles and EEVEE."""

from __future__ import annotations

import bpy

from .layout import RADIANCE
from .tree import Tree

NAME = "Gaussian Splat"
EMISSION = "splat_emission"  # set by the node group: what the splat emits, scene-linear
# As in the generator's renderer: a splat never hides everything behind it, and ends where its alpha falls below 1/255.
ALPHA_MAX = 0.999
ALPHA_MIN = 1 / 255


def ensure() -> bpy.types.Material:
    """The splat material of this file, made on first use."""
    material = bpy.data.materials.get(NAME)
    return material if material is not None else _make()


def _make() -> bpy.types.Material:
    """Each instance is a unit sphere, scaled so that its surface is where the splat's alpha falls to 1/255.

    With p a point of the ray and i its direction, both in the sphere's frame, the squared distance of the ray from
    the centre is d2 = |p|^2 - (p.i)^2 / (i.i), and the Gaussian's peak along the ray is
    alpha = o exp(-k^2 d2 / 2) = o (255 o)^(-d2), because k^2 = 2 ln(255 o).
    """
    material = bpy.data.materials.new(NAME)
    if material.node_tree is None:
        material.use_nodes = True
    material.surface_render_method = "BLENDED"  # sorted by instance centre, as splats are
    material.use_backface_culling = True
    material.diffuse_color = (0.8, 0.8, 0.8, 1.0)
    if hasattr(material, "cycles"):
        material.cycles.emission_sampling = "NONE"  # thousands of tiny lamps would only add noise
    nodes = material.node_tree.nodes
    nodes.clear()
    t = Tree(material.node_tree)

    point = t.node("ShaderNodeTexCoord").outputs["Object"]
    geometry = t.node("ShaderNodeNewGeometry")
    ray = t.node(
        "ShaderNodeVectorTransform", {0: geometry.outputs["Incoming"]}, vector_type="VECTOR", convert_from="WORLD", convert_to="OBJECT"
    ).outputs[0]
    emission = t.node("ShaderNodeAttribute", attribute_type="INSTANCER", attribute_name=EMISSION).outputs["Color"]
    opacity = t.node("ShaderNodeAttribute", attribute_type="INSTANCER", attribute_name=RADIANCE).outputs["Alpha"]

    ray = t.vector("NORMALIZE", ray)
    along = t.vector("DOT_PRODUCT", point, ray)
    distance2 = t.math("SUBTRACT", t.vector("DOT_PRODUCT", point, point), t.math("MULTIPLY", along, along))
    falloff = t.math("POWER", t.math("MULTIPLY", opacity, 1 / ALPHA_MIN), t.math("MULTIPLY", distance2, -1.0))
    alpha = t.math("MINIMUM", t.math("MULTIPLY", opacity, falloff), ALPHA_MAX)
    inside = t.math("LESS_THAN", distance2, 1.0)
    front = t.math("SUBTRACT", 1.0, geometry.outputs["Backfacing"])
    alpha = t.math("MULTIPLY", t.math("MULTIPLY", alpha, inside), front)

    clear = t.node("ShaderNodeBsdfTransparent").outputs[0]
    glow = t.node("ShaderNodeEmission", {"Color": emission, "Strength": 1.0}).outputs[0]
    mixed = t.node("ShaderNodeMixShader", {0: alpha, 1: clear, 2: glow}).outputs[0]
    t.node("ShaderNodeOutputMaterial", {"Surface": mixed})
    t.arrange()
    return material
