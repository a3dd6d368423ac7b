"""The scene settings that splats need: what they are, which differ, set them, put the old ones back.

Nothing here is called on its own: a person presses the button, or asks for a batch whose scene is made for it. Both
engines need the view transform and the splats' smoothing, which depends on the camera and the resolution; Cycles, on a
processor or a GPU, needs the bounces. EEVEE needs nothing else: the splats' materials ask for its sorted blending.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import bpy

from ..generator.files import parse_json
from . import splat_object
from .splat_object import inputs, node_group

# The most that Cycles takes. Rays pass through many translucent splats: 50 to 200 where an object fills the frame, many
# hundreds where it is small. The default of 8 leaves holes; beyond the minimum Cycles drops rays at random.
TRANSPARENT_BOUNCES = 1024
# By path from the scene, as the user interface names them.
_LABELS = {
    "view_settings.view_transform": "View transform",
    "view_settings.look": "Look",
    "cycles.transparent_max_bounces": "Transparent bounces",
    "cycles.min_transparent_bounces": "Minimum transparent bounces",
}
_OBJECTS = "objects/"


@dataclass(frozen=True)
class Change:
    """One setting that differs from what splats need."""

    path: str  # from the scene: "cycles.transparent_max_bounces"; for the smoothing of an object "objects/NAME"
    label: str  # as the user interface names it
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = (f"{value:.3g}" if isinstance(value, float) else value for value in (self.old, self.new))
        return f"{self.label}: {old} to {new}"


def changes(scene: bpy.types.Scene) -> list[Change]:
    """What `apply` would change; empty where all is well."""
    is_plain = scene.view_settings.view_transform in ("Standard", "Raw")
    needed: list[tuple[str, Any, bool]] = [("view_settings.view_transform", "Standard", is_plain)]
    if not is_plain:  # a look belongs to its view transform: Blender drops it with that
        needed.append(("view_settings.look", "None", scene.view_settings.look == "None"))
    if hasattr(scene, "cycles"):  # the Cycles add-on may be disabled
        for path in ("cycles.transparent_max_bounces", "cycles.min_transparent_bounces"):
            needed.append((path, TRANSPARENT_BOUNCES, _get(scene, path) >= TRANSPARENT_BOUNCES))
    return [Change(path, _LABELS[path], _get(scene, path), new) for path, new, fine in needed if not fine] + _smoothing(scene)


def _smoothing(scene: bpy.types.Scene) -> list[Change]:
    """The low-pass of splat renderers, for the camera and resolution as they are; what is keyframed or driven is left alone."""
    pixel = splat_object.pixel(scene)
    if not pixel:
        return []
    found = []
    for object in scene.objects:
        modifier = _smoothed_by(object)
        if modifier and not inputs.is_animated(modifier, inputs.SMOOTHING):
            old, new = inputs.get_value(modifier, inputs.SMOOTHING), node_group.LOW_PASS_PIXELS * pixel
            if abs(old - new) > 0.01 * new:
                found.append(Change(_OBJECTS + object.name, _label(_OBJECTS + object.name), old, new))
    return found


def _smoothed_by(object: bpy.types.Object | None) -> bpy.types.Modifier | None:
    """The modifier of a splat object of this file that takes smoothing."""
    if object is None or object.library is not None or not splat_object.is_splats(object):
        return None
    modifier = node_group.modifier_of(object)
    return modifier if modifier and inputs.has(modifier, inputs.SMOOTHING) else None


def apply(scene: bpy.types.Scene) -> list[Change]:
    """Set what splats need and remember the old values in the scene. Returns what was changed."""
    todo = changes(scene)
    # A second run must not take its own values for the user's: the first old value of each setting is the one kept.
    stored = {change.path: change.old for change in todo} | stored_values(scene)
    for change in todo:
        _set(scene, change.path, change.new)
    if stored:
        scene.gaussian_atlas.stored_render_settings = json.dumps(stored)
    return todo


def restore(scene: bpy.types.Scene) -> tuple[list[Change], list[str]]:
    """Put the remembered values back and forget them. Returns what was changed, and a line for each that could not be."""
    done, refused = [], []
    for path, value in stored_values(scene).items():  # the view transform comes before its look
        if path.startswith(_OBJECTS) and _smoothed_by(scene.objects.get(path.removeprefix(_OBJECTS))) is None:
            continue  # the object is gone
        try:
            change = Change(path, _label(path), _get(scene, path), value)
            _set(scene, path, value)
        except (AttributeError, TypeError, ValueError, OverflowError):  # of another Blender, or of an add-on that is disabled
            refused.append(f"{_label(path)}: {value!r} cannot be put back here")
        else:
            done.append(change)
    scene.gaussian_atlas.stored_render_settings = ""
    return done, refused


def stored_values(scene: bpy.types.Scene) -> dict[str, Any]:
    """The values from before `apply`, by path; what a damaged file holds beside them is left out."""
    try:
        stored = parse_json(scene.gaussian_atlas.stored_render_settings or "{}")
    except ValueError:
        return {}
    known = stored.items() if isinstance(stored, dict) else ()
    return {path: value for path, value in known if path in _LABELS or path.startswith(_OBJECTS)}


def _label(path: str) -> str:
    return f"Smoothing of {path.removeprefix(_OBJECTS)}" if path.startswith(_OBJECTS) else _LABELS[path]


def _get(scene: bpy.types.Scene, path: str) -> Any:
    if path.startswith(_OBJECTS):
        return inputs.get_value(_smoothed_by(scene.objects[path.removeprefix(_OBJECTS)]), inputs.SMOOTHING)
    owner, _, name = path.partition(".")
    return getattr(getattr(scene, owner), name)


def _set(scene: bpy.types.Scene, path: str, value: Any) -> None:
    if path.startswith(_OBJECTS):
        inputs.set_value(_smoothed_by(scene.objects[path.removeprefix(_OBJECTS)]), inputs.SMOOTHING, float(value))
        return
    owner, _, name = path.partition(".")
    setattr(getattr(scene, owner), name, value)
