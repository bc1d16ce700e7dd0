"""The ops: registration under `lomacs::`, autograd, and the choice of backend; one file a stem."""

from .aeplus import aeplus_loss
from .dispatch import BackendError, backend_table, use_backend
from .ortho import bjorck, ortho_refine
from .spectral import spectral_calibrate, svd_tail

__all__ = [
    "BackendError",
    "aeplus_loss",
    "backend_table",
    "bjorck",
    "ortho_refine",
    "spectral_calibrate",
    "svd_tail",
    "use_backend",
]
