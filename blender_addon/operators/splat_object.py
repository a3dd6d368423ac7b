"""What is done to a splat object's modifier beyond setting its inputs."""

from __future__ import annotations

import bpy
import numpy as np

from .. import splat_object
from ..splat_object import inputs, layout, node_group

# The box is a little larger than what it is put round, so that nothing is cropped before it is moved.
_MARGIN = 1.05


class AddCropBoxOperator(bpy.types.Operator):
    """Put a box round the active splat object and show only what is inside: move, turn, scale and animate the box"""

    bl_idname = "gaussian_atlas.add_crop_box"
    bl_label = "Add Crop Box"
    bl_options = {"REGISTER", "UNDO"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        object = context.active_object
        modifier = node_group.modifier_of(object) if splat_object.is_splats(object) else None
        if modifier is None or object.library is not None or not inputs.has(modifier, inputs.CROP_BOX):
            cls.poll_message_set("Select a splat object of this file")
            return False
        return context.mode == "OBJECT"

    def execute(self, context: bpy.types.Context) -> set[str]:
        object = context.active_object
        centres = layout.extract(object.data)[layout.POSITION]
        low, high = centres.min(0), centres.max(0)
        box = bpy.data.objects.new(f"{object.name} Crop", None)
        box.empty_display_type, box.empty_display_size = "CUBE", 1.0
        for collection in object.users_collection:
            collection.objects.link(box)
        box.parent = object
        box.location = (low + high) / 2
        box.scale = np.maximum((high - low) / 2 * _MARGIN, 1e-3)
        modifier = node_group.modifier_of(object)
        inputs.set_value(modifier, inputs.CROP_BOX, box)
        inputs.set_value(modifier, inputs.CROP, True)
        for other in context.selected_objects:
            other.select_set(False)
        box.select_set(True)
        context.view_layer.objects.active = box
        return {"FINISHED"}


CLASSES = (AddCropBoxOperator,)
