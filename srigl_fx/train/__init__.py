"""Sparse training: schedules and mask updates (pure functions), the mask engine (hooks), and the trainers.

Owns how masks change and how they are kept during training. It must not know graph passes or what executes a model.
"""

from srigl_fx.train.attach import detach_from
from srigl_fx.train.distributed import ignore_masks
from srigl_fx.train.gmp import GMP
from srigl_fx.train.rigl import RigL
from srigl_fx.train.schedules import Schedule
from srigl_fx.train.set import SET
from srigl_fx.train.snfs import SNFS
from srigl_fx.train.sparse_compute import compute_sparse
from srigl_fx.train.srigl import SRigL
from srigl_fx.train.static import Static

__all__ = ["GMP", "SET", "SNFS", "RigL", "SRigL", "Schedule", "Static", "compute_sparse", "detach_from", "ignore_masks"]
