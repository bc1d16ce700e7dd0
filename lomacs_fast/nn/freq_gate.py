from typing import Any, ClassVar

from torch import Tensor

from lomacs_fast import functional, reference


class AxialLowRankFreqGate(reference.AxialLowRankFreqGate):
    __doc__ = reference.AxialLowRankFreqGate.__doc__
    functions: ClassVar[Any] = functional

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # past the lookup by name, which is felt at one sample; a parametrised weight takes it
        m: Any = self._modules
        layers = (m[side]._modules[n]._parameters for side in ("row_mlp", "col_mlp") for n in ("0", "2"))
        try:
            row_w1, row_w2, col_w1, col_w2 = (layer["weight"] for layer in layers)
        except KeyError:
            return super().weights
        return row_w1, row_w2, col_w1, col_w2
