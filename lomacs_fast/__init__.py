"""Networks that learn the SVD of complex MIMO channel matrices."""

from . import functional, reference
from .nn import (
    AEPlusLoss,
    AxialLowRankFreqGate,
    GatedConv1D,
    GroupedProjectedAttention,
    LoMACSSVDNet,
    LowMACS_SVDNet,
    NeuralOrthoRefiner,
)

__version__ = "0.1.0"

__all__ = [
    "AEPlusLoss",
    "AxialLowRankFreqGate",
    "GatedConv1D",
    "GroupedProjectedAttention",
    "LoMACSSVDNet",
    "LowMACS_SVDNet",
    "NeuralOrthoRefiner",
    "functional",
    "reference",
]
