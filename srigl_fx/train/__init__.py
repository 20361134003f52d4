"""Sparse training: schedules and mask updates (pure functions), the mask engine (hooks), and the trainers.

Owns how masks change and how they are kept during training. It must not know graph passes or what executes a model.
"""

from srigl_fx.train.engine import detach_from
from srigl_fx.train.trainers import SRigL, Static

__all__ = ["SRigL", "Static", "detach_from"]
