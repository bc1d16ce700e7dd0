from types import SimpleNamespace
from typing import Any, ClassVar

from lomacs_fast import functional, reference

from .freq_gate import AxialLowRankFreqGate
from .gated_conv import GatedConv1D
from .ortho import NeuralOrthoRefiner
from .projected_attention import GroupedProjectedAttention
from .refine import SpectralRefiner


class LoMACSSVDNet(reference.LoMACSSVDNet):
    __doc__ = reference.LoMACSSVDNet.__doc__
    functions: ClassVar[Any] = functional
    modules_: ClassVar[Any] = SimpleNamespace(
        AxialLowRankFreqGate=AxialLowRankFreqGate,
        GroupedProjectedAttention=GroupedProjectedAttention,
        GatedConv1D=GatedConv1D,
        NeuralOrthoRefiner=NeuralOrthoRefiner,
        SpectralRefiner=SpectralRefiner,
    )


LowMACS_SVDNet = LoMACSSVDNet
