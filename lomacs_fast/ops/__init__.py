"""The ops: registration under `lomacs::`, autograd, and the choice of backend; one file a stem."""

from .aeplus import aeplus_loss
from .backbone import backbone_at_once
from .dispatch import BackendError, backend_table, chosen, use_backend
from .dual_view import dual_view_project, gate_project
from .freq_gate import freq_gate
from .frozen import flat_at_once, frozen_angular_svd, frozen_svd, frozen_svd_at_once, serves_at_once
from .gated_conv import gated_conv1d, gated_conv1d_at_once
from .heads import svd_heads
from .low_rank import low_rank_loss
from .native import library_states, load_ops
from .network import svd_network_at_once
from .neural_svd import neural_svd_steps
from .ortho import bjorck, ortho_refine, ortho_refine_at_once
from .projected_attention import projected_attention, projected_attention_at_once
from .refine import approx_svd, refine_svd
from .spectral import spectral_calibrate, svd_tail

__all__ = [
    "BackendError",
    "aeplus_loss",
    "approx_svd",
    "backbone_at_once",
    "backend_table",
    "bjorck",
    "chosen",
    "dual_view_project",
    "flat_at_once",
    "freq_gate",
    "frozen_angular_svd",
    "frozen_svd",
    "frozen_svd_at_once",
    "gate_project",
    "gated_conv1d",
    "gated_conv1d_at_once",
    "library_states",
    "load_ops",
    "low_rank_loss",
    "neural_svd_steps",
    "ortho_refine",
    "ortho_refine_at_once",
    "projected_attention",
    "projected_attention_at_once",
    "refine_svd",
    "serves_at_once",
    "spectral_calibrate",
    "svd_heads",
    "svd_network_at_once",
    "svd_tail",
    "use_backend",
]
