"""What the extension stores: settings in the scene, provenance in each object, status in the running session."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import bpy
from bpy.props import BoolProperty, FloatProperty, IntProperty, PointerProperty, StringProperty

from ..generator import vocabulary
from ..generator.errors import InputError
from . import extension, history, service
from .generation import SEED_MAX, Provenance
from .splat_object import cells as _cells

# Of a record of edits that a file carries: a .ply has room for 8,000 characters, and quotes in it count twice.
_EDIT_LIMIT = 4000

# What Blender's properties cannot hold: text ends at a null, is UTF-8, and numbers have 32 bits.
_UNFIT = re.compile("[\0\ud800-\udfff]")
_FLOAT_MAX = 3.4e38

_SUGGESTIONS_MAX = 30


def _suggest_prompts(self: GaussianAtlasSettings, context: bpy.types.Context, text: str) -> list[str]:
    """Earlier prompts that hold the text, then what the model knows that completes it."""
    earlier = [prompt for prompt in history.read(extension.history_file()).prompts if text.lower() in prompt.lower()]
    try:
        known = vocabulary.suggestions(text, service.describe(extension.model_folder(context)).vocabulary)
    except InputError:
        known = []
    return list(dict.fromkeys(earlier + known))[:_SUGGESTIONS_MAX]


class GaussianAtlasSettings(bpy.types.PropertyGroup):
    """Scene.gaussian_atlas: what the next generation uses."""

    prompt: StringProperty(
        name="Prompt",
        description="The object to generate, in a few English words",
        default="",
        options={"TEXTEDIT_UPDATE"},
        search=_suggest_prompts,
        search_options={"SUGGESTION"},
    )
    negative_prompt: StringProperty(name="Negative Prompt", description="What the object should not be", default="")
    seed: IntProperty(
        name="Seed", description="The same prompt and seed give the same object on one machine", default=0, min=0, max=SEED_MAX
    )
    randomize_seed: BoolProperty(name="Randomize", description="Draw a new seed at every press of Generate", default=False)
    steps: IntProperty(
        name="Steps",
        description="Solver steps: more take longer and follow the model more closely",
        default=20,
        min=1,
        max=1000,
        soft_max=50,
    )
    guidance: FloatProperty(
        name="Guidance",
        description="How strongly the prompt steers; 1 is without guidance. 2 suits the starter model, 3.5 most others",
        default=2.0,
        min=0.0,
        max=30.0,
        soft_max=10.0,
    )
    count: IntProperty(name="Count", description="Objects to generate, with consecutive seeds", default=1, min=1, max=1000, soft_max=8)
    mix_prompt: StringProperty(
        name="Mix With", description="A second prompt: the object comes to lie between both. Empty for none", default=""
    )
    mix_weight: FloatProperty(
        name="Weight",
        description="Of the second prompt: 0 is the first alone, 1 the second",
        default=0.5,
        min=0.0,
        max=1.0,
        subtype="FACTOR",
    )
    edit_strength: FloatProperty(
        name="Strength",
        description="How far variations go: 0 is the object itself, 1 a new one",
        default=0.5,
        min=0.0,
        max=1.0,
        subtype="FACTOR",
    )
    edit_prompt: StringProperty(
        name="Edit Prompt", description="What variations and regenerated splats should be; empty for the object's own prompt", default=""
    )
    edit_count: IntProperty(
        name="Variations", description="Variations to make, with consecutive seeds", default=3, min=1, max=1000, soft_max=8
    )
    stored_render_settings: StringProperty(
        options={"HIDDEN"}, description="Render settings from before they were adapted to splats, as JSON"
    )


class GaussianAtlasObject(bpy.types.PropertyGroup):
    """Object.gaussian_atlas: where a splat object came from. Empty where it is none or its origin is unknown."""

    prompt: StringProperty(name="Prompt")
    negative_prompt: StringProperty(name="Negative Prompt")
    seed: IntProperty(name="Seed", min=0, max=SEED_MAX)
    steps: IntProperty(name="Steps", min=0)
    guidance: FloatProperty(name="Guidance")
    model_name: StringProperty(name="Model")
    model_hash: StringProperty(name="Model Hash", description="sha256 of the model's bundle.json")
    program_version: StringProperty(name="Program Version")
    mix_prompt: StringProperty(name="Mixed With", description="The second prompt of a mix")
    mix_weight: FloatProperty(name="Mix Weight", default=0.5)
    layout_id: StringProperty(name="Layout", description="Id of the atlas layout that the splats' cells belong to")
    low_pass: FloatProperty(name="Low Pass", description="Standard deviation that the splats were widened by", precision=6)
    edit: StringProperty(name="Edit", description="The edit that made the object, as JSON")
    file: StringProperty(name="File", description="The file that the splats were imported from")


class GaussianAtlasStatus(bpy.types.PropertyGroup):
    """WindowManager.gaussian_atlas: the generation that runs now. Never saved."""

    running: BoolProperty()
    stage: StringProperty()
    fraction: FloatProperty(min=0.0, max=1.0, subtype="FACTOR")
    error: StringProperty()
    fix_operator: StringProperty()
    fix_label: StringProperty()


def store_provenance(object: bpy.types.Object, provenance: Provenance) -> None:
    """Write provenance into an object."""
    for field in fields(Provenance):
        setattr(object.gaussian_atlas, field.name, getattr(provenance, field.name))


def stored_provenance(object: bpy.types.Object) -> Provenance | None:
    """The provenance in an object; None where it was not generated."""
    stored = object.gaussian_atlas
    if not stored.prompt:
        return None
    found: dict[str, Any] = {field.name: getattr(stored, field.name) for field in fields(Provenance)}
    for name, value in found.items():
        if isinstance(value, float):
            # Blender keeps single precision: 3.7 would come back as 3.700000047683716.
            found[name] = float(f"{value:.7g}")
    return Provenance(**found)


def metadata(object: bpy.types.Object, moved: bool = False) -> dict | None:
    """What an exported file says of an object; None where it was not generated.

    A file has no place for the cells of its splats: it names their layout where splat i is cell i, which an object is as long as none is
    deleted.

    Args:
        moved: the file holds the splats elsewhere than the object's own frame does.
    """
    provenance = stored_provenance(object)
    if provenance is None:
        return None
    found = _cells.stored(object)
    if moved or found is None or not (found == range(len(found))).all():
        provenance = replace(provenance, layout_id="")
    if len(provenance.edit) > _EDIT_LIMIT:
        provenance = replace(provenance, edit="")
    return provenance.as_metadata()


def provenance_from_metadata(metadata: dict | None) -> Provenance | None:
    """The provenance that an exported file carries; None where it has none or it is not readable as such.

    Raises:
        InputError: it is one of numbers or text that Blender's properties cannot hold; what cannot be made again has no provenance.
    """
    if metadata is None:
        return None
    try:
        found = Provenance(
            prompt=str(metadata["prompt"]),
            negative_prompt=str(metadata["negative_prompt"]),
            seed=int(metadata["seed"]),
            steps=int(metadata["steps"]),
            guidance=float(metadata["guidance"]),
            model_name=str(metadata["model_name"]),
            model_hash=str(metadata["model_hash"]),
            program_version=str(metadata["program_version"]),
            # What earlier versions did not write.
            mix_prompt=str(metadata.get("mix_prompt", "")),
            mix_weight=float(metadata.get("mix_weight", 0.5)),
            layout_id=str(metadata.get("layout_id", "")),
            low_pass=float(metadata.get("low_pass", 0.0)),
            edit=str(metadata.get("edit", "")),
        )
    except (KeyError, TypeError, ValueError):
        return None
    except OverflowError:
        raise InputError("what made the object is left out: a number of it is out of range") from None
    for field in fields(Provenance):
        match getattr(found, field.name):
            case str(value):
                fits, kind = not _UNFIT.search(value), "text"
            case int(value):
                fits, kind = 0 <= value <= SEED_MAX, "integers"
            case value:
                fits, kind = abs(value) <= _FLOAT_MAX, "numbers"
        if not fits:
            raise InputError(f"what made the object is left out: its {field.name} {value!r:.40} does not fit Blender's {kind}")
    return found


CLASSES = (GaussianAtlasSettings, GaussianAtlasObject, GaussianAtlasStatus)
_POINTERS = {bpy.types.Scene: GaussianAtlasSettings, bpy.types.Object: GaussianAtlasObject, bpy.types.WindowManager: GaussianAtlasStatus}


def attach() -> None:
    """Add the `gaussian_atlas` property to its owners; the classes are registered before."""
    for owner, group in _POINTERS.items():
        owner.gaussian_atlas = PointerProperty(type=group)


def detach() -> None:
    """Take the `gaussian_atlas` property from its owners."""
    for owner in _POINTERS:
        del owner.gaussian_atlas
