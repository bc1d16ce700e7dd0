from typing import Any, ClassVar

from torch import Tensor

from lomacs_fast import functional, reference


class GatedConv1D(reference.GatedConv1D):
    __doc__ = reference.GatedConv1D.__doc__
    functions: ClassVar[Any] = functional

    def forward(self, x: Tensor) -> Tensor:
        # each lookup by name is felt at one sample
        dw, pw = self.dw, self.pw
        return self.functions.gated_conv1d(x, dw.weight, dw.bias, pw.weight, pw.bias)
