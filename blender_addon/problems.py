"""Errors that a person can act on: one sentence, and where there is one, the operator that mends it. No bpy."""

from __future__ import annotations

from dataclasses import dataclass

from .job import one_line


@dataclass(frozen=True)
class Problem:
    message: str
    operator: str = ""  # idname of the operator to draw as a button under the message
    label: str = ""  # the button's text


def explain(error: BaseException, starter: bool = True) -> Problem:
    """What to tell a person about an error of generation.

    Args:
        starter: the bundled model was in use, so that it is no way out.
    """
    text = one_line(error)
    if isinstance(error, ImportError):
        return Problem(
            f"{error.name or 'A package'} cannot be imported: install the extension zip that is made for your system",
            "gaussian_atlas.open_preferences",
            "Open Preferences",
        )
    # torch.cuda.OutOfMemoryError by name, so that torch need not be imported here; on the CPU torch raises a RuntimeError.
    if type(error).__name__ == "OutOfMemoryError" and "CUDA" in text:
        return Problem("The GPU has not enough memory: close what else uses it, or generate on the processor",
                       "gaussian_atlas.use_cpu", "Use the CPU")  # fmt: skip
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return Problem("There is not enough memory to generate: unload the model, close other programs and try again",
                       "gaussian_atlas.unload_model", "Unload Model")  # fmt: skip
    if "device cuda" in text:
        return Problem("There is no NVIDIA GPU that this torch can use: generate on the processor",
                       "gaussian_atlas.use_cpu", "Use the CPU")  # fmt: skip
    if "prompt is empty" in text:
        return Problem(text, "gaussian_atlas.example_prompt", "Try an Example")
    if "may not go online" in text:
        return Problem(text, "gaussian_atlas.open_network_preferences", "Open Network Preferences")
    if "bundle" in text or "model" in text.lower():
        if starter:
            return Problem(text, "gaussian_atlas.open_preferences", "Choose a Model")
        return Problem(text, "gaussian_atlas.use_starter_model", "Use the Starter Model")
    return Problem(text)
