"""The scene settings that splats need: what they are, which differ, set them, put the old ones back.

Nothing here is called on its own: a person presses the button, or asks for a batch whose scene is made for it. Both
engines need the view transform; Cycles, on a processor or a GPU, needs the bounces; EEVEE needs nothing else, since the
splats' materials ask for its sorted blending themselves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import bpy

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


@dataclass(frozen=True)
class Change:
    """One setting that differs from what splats need."""

    path: str  # from the scene: "cycles.transparent_max_bounces"
    label: str  # as the user interface names it
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.label}: {self.old} to {self.new}"


def changes(scene: bpy.types.Scene) -> list[Change]:
    """What `apply` would change; empty where all is well."""
    is_plain = scene.view_settings.view_transform in ("Standard", "Raw")
    needed = [("view_settings.view_transform", _LABELS["view_settings.view_transform"], "Standard", is_plain)]
    if not is_plain:  # a look belongs to its view transform: Blender drops it with that
        needed.append(("view_settings.look", _LABELS["view_settings.look"], "None", scene.view_settings.look == "None"))
    if hasattr(scene, "cycles"):  # the Cycles add-on may be disabled
        for path in ("cycles.transparent_max_bounces", "cycles.min_transparent_bounces"):
            needed.append((path, _LABELS[path], TRANSPARENT_BOUNCES, _get(scene, path) >= TRANSPARENT_BOUNCES))
    return [Change(path, label, _get(scene, path), new) for path, label, new, fine in needed if not fine]


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


def restore(scene: bpy.types.Scene) -> list[Change]:
    """Put the remembered values back. Returns what was changed."""
    done = []
    for path, value in stored_values(scene).items():  # the view transform comes before its look
        done.append(Change(path, _LABELS[path], _get(scene, path), value))
        _set(scene, path, value)
    scene.gaussian_atlas.stored_render_settings = ""
    return done


def stored_values(scene: bpy.types.Scene) -> dict[str, Any]:
    """The values from before `apply`, by path."""
    stored = scene.gaussian_atlas.stored_render_settings
    return json.loads(stored) if stored else {}


def _get(scene: bpy.types.Scene, path: str) -> Any:
    owner, _, name = path.partition(".")
    return getattr(getattr(scene, owner), name)


def _set(scene: bpy.types.Scene, path: str, value: Any) -> None:
    owner, _, name = path.partition(".")
    setattr(getattr(scene, owner), name, value)
