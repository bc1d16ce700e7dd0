"""The ops: registration under `lomacs::`, autograd, and the choice of backend; one file a stem."""

from .aeplus import aeplus_loss
from .dispatch import BackendError, backend_table, use_backend
from .low_rank import low_rank_loss

__all__ = ["BackendError", "aeplus_loss", "backend_table", "low_rank_loss", "use_backend"]
