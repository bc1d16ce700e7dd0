from types import SimpleNamespace
from typing import Any, ClassVar

from torch import Tensor

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

    def _published(self, H: Tensor, scene: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights = self._weights() if H.is_cpu else None
        found = None if weights is None else functional.svd_network_at_once(H, scene, self.tau_s, weights)
        return super()._published(H, scene) if found is None else found


LowMACS_SVDNet = LoMACSSVDNet
