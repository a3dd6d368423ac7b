"""Errors that a person can act on: one sentence, and where there is one, the operator that mends it. No bpy."""

from __future__ import annotations

from dataclasses import dataclass

from .job import one_line


@dataclass(frozen=True)
class Problem:
    message: str
    operator: str = ""  # idname of the operator to draw as a button under the message
    label: str = ""  # the button's text


def explain(error: BaseException) -> Problem:
    """What to tell a person about an error of generation."""
    text = one_line(error)
    if isinstance(error, ImportError):
        return Problem(
            f"{error.name or 'A package'} cannot be imported: install the extension zip that is made for your system",
            "gaussian_atlas.open_preferences",
            "Open Preferences",
        )
    # torch.cuda.OutOfMemoryError by name, so that torch need not be imported here.
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return Problem("There is not enough memory to generate: unload the model, close other programs and try again",
                       "gaussian_atlas.unload_model", "Unload Model")  # fmt: skip
    if "bundle.json" in text or "model" in text.lower():
        return Problem(text, "gaussian_atlas.open_preferences", "Choose a Model")
    return Problem(text)
