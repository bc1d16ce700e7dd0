"""Networks that learn the SVD of complex MIMO channel matrices."""

from . import functional, reference
from .acceleration import AccelerationReport, accelerate
from .approximation import approx_svd
from .auditing import Audit, audit
from .exporting import export_onnx
from .freezing import FrozenSVDNet, freeze
from .neural_svd import NeuralSVD, NeuralSVDResult, neural_svd
from .nn import (
    AEPlusLoss,
    AxialLowRankFreqGate,
    GatedConv1D,
    GroupedProjectedAttention,
    LoMACSSVDNet,
    LowMACS_SVDNet,
    NeuralOrthoRefiner,
    SpectralRefiner,
)
from .ops import BackendError, backend_table, library_states, load_ops, use_backend
from .pretrained import load_pretrained

__version__ = "0.1.0"

__all__ = [
    "AEPlusLoss",
    "AccelerationReport",
    "Audit",
    "AxialLowRankFreqGate",
    "BackendError",
    "FrozenSVDNet",
    "GatedConv1D",
    "GroupedProjectedAttention",
    "LoMACSSVDNet",
    "LowMACS_SVDNet",
    "NeuralOrthoRefiner",
    "NeuralSVD",
    "NeuralSVDResult",
    "SpectralRefiner",
    "accelerate",
    "approx_svd",
    "audit",
    "backend_table",
    "export_onnx",
    "freeze",
    "functional",
    "library_states",
    "load_ops",
    "load_pretrained",
    "neural_svd",
    "reference",
    "use_backend",
]
