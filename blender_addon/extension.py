"""Where the extension lives: package name, folders, chosen model and device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import bpy

# "bl_ext.<repository>.gaussian_atlas": the key of the preferences.
PACKAGE = __package__.rpartition(".")[0]
FOLDER = Path(__file__).resolve().parent.parent
STARTER_MODEL = FOLDER / "models" / "starter"


def model_folder(context: bpy.types.Context) -> Path:
    """The model chosen in the preferences; an empty choice is the bundled starter model."""
    import bpy

    addon = context.preferences.addons.get(PACKAGE)
    chosen = addon.preferences.model_path if addon else ""
    return Path(bpy.path.abspath(chosen)) if chosen else STARTER_MODEL


def device(context: bpy.types.Context) -> str:
    """The device chosen in the preferences: "auto", "cpu" or "cuda"."""
    addon = context.preferences.addons.get(PACKAGE)
    return addon.preferences.device if addon else "auto"


def user_folder() -> Path:
    """Where the extension keeps what outlives its updates. Not made here: nothing is written before there is something to write."""
    import bpy

    return Path(bpy.utils.extension_path_user(PACKAGE))


def models_folder() -> Path:
    """Where installed models are."""
    return user_folder() / "models"


def history_file() -> Path:
    """Earlier prompts and measured speeds, see history.py."""
    return user_folder() / "history.json"
