"""What the panels of the tab share."""

from __future__ import annotations

import textwrap

import bpy


class SidebarPanel:
    """Where every panel of the extension is."""

    bl_space_type = "VIEW_3D"
    bl_region_type = "UI"
    bl_category = "Gaussian Atlas"


def draw_text(layout: bpy.types.UILayout, context: bpy.types.Context, text: str, icon: str) -> None:
    """A text over as many lines as the region's width asks for: labels do not wrap by themselves."""
    scale = context.preferences.system.ui_scale or 1.0  # 0 in background
    width = context.region.width if context.region else 250
    # Without the icon, the borders and the tabs, and 7 pixels a letter.
    characters = max(20, int((width / scale - 60) / 7))
    text = text[:1].upper() + text[1:]
    column = layout.column(align=True)
    for index, line in enumerate(textwrap.wrap(text, characters)):
        column.label(text=line, icon=icon if index == 0 or icon == "NONE" else "BLANK1")
