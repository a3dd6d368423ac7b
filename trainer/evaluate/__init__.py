"""How good what a model or any other method makes is, and what it has seen."""

from .prompts import fixed_prompts, own_prompts, read_prompts
from .report import Protocol, evaluate, summary_line

__all__ = ["Protocol", "evaluate", "fixed_prompts", "own_prompts", "read_prompts", "summary_line"]
