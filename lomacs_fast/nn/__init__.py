"""The modules on the public functions; parameters and constructors are those of the reference."""

from .aeplus import AEPlusLoss
from .freq_gate import AxialLowRankFreqGate
from .gated_conv import GatedConv1D
from .network import LoMACSSVDNet, LowMACS_SVDNet
from .ortho import NeuralOrthoRefiner
from .projected_attention import GroupedProjectedAttention
from .refine import SpectralRefiner

__all__ = [
    "AEPlusLoss",
    "AxialLowRankFreqGate",
    "GatedConv1D",
    "GroupedProjectedAttention",
    "LoMACSSVDNet",
    "LowMACS_SVDNet",
    "NeuralOrthoRefiner",
    "SpectralRefiner",
]
