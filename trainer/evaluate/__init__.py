"""A first look at a model: what it draws, beside what it has seen."""

from .nearest import nearest_report

__all__ = ["nearest_report"]
