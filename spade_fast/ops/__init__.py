"""The modulation as one differentiable operation, and the norms around it."""

from .modulate import plane_moments, spade_modulate

__all__ = ["plane_moments", "spade_modulate"]
