"""The specification in plain PyTorch: correctness, not speed; float32 and float64. One file a stem."""

from .aeplus import AEPlusLoss, AEPlusTerms, aeplus_loss, aeplus_terms
from .angular_gate import AngularGate
from .backbone import backbone
from .dual_view import coarse_map, dual_view_project, gate_project
from .freq_gate import AxialLowRankFreqGate, freq_gate, spectral_gate, unit_norm
from .frozen import (
    FrozenAngular,
    FrozenWeights,
    fold_angular,
    fold_network,
    frozen_angular_svd,
    frozen_svd,
)
from .gated_conv import GatedConv1D, gated_conv1d
from .heads import pooled_heads, svd_heads
from .low_rank import low_rank_loss
from .network import LoMACSSVDNet, NetworkWeights
from .neural_svd import neural_svd_steps
from .ortho import NeuralOrthoRefiner, bjorck, column_normalize, ortho_refine, ortho_refine_pair
from .projected_attention import GroupedProjectedAttention, projected_attention
from .refine import SpectralRefiner, refine_svd
from .spectral import spectral_calibrate, svd_tail

LowMACS_SVDNet = LoMACSSVDNet

__all__ = [
    "AEPlusLoss",
    "AEPlusTerms",
    "AngularGate",
    "AxialLowRankFreqGate",
    "FrozenAngular",
    "FrozenWeights",
    "GatedConv1D",
    "GroupedProjectedAttention",
    "LoMACSSVDNet",
    "LowMACS_SVDNet",
    "NetworkWeights",
    "NeuralOrthoRefiner",
    "SpectralRefiner",
    "aeplus_loss",
    "aeplus_terms",
    "backbone",
    "bjorck",
    "coarse_map",
    "column_normalize",
    "dual_view_project",
    "fold_angular",
    "fold_network",
    "freq_gate",
    "frozen_angular_svd",
    "frozen_svd",
    "gate_project",
    "gated_conv1d",
    "low_rank_loss",
    "neural_svd_steps",
    "ortho_refine",
    "ortho_refine_pair",
    "pooled_heads",
    "projected_attention",
    "refine_svd",
    "spectral_calibrate",
    "spectral_gate",
    "svd_heads",
    "svd_tail",
    "unit_norm",
]
