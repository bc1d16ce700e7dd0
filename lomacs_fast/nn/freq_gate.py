from typing import Any, ClassVar

from torch import Tensor

from lomacs_fast import functional, reference


class AxialLowRankFreqGate(reference.AxialLowRankFreqGate):
    __doc__ = reference.AxialLowRankFreqGate.__doc__
    functions: ClassVar[Any] = functional

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # past the lookup by name, which is felt at one sample; a parametrised weight takes it
        row, col = self._modules["row_mlp"]._modules, self._modules["col_mlp"]._modules  # type: ignore[union-attr]
        try:
            row_w1, row_w2, col_w1, col_w2 = (
                mlp[name]._parameters["weight"]
                for mlp in (row, col)
                for name in ("0", "2")  # type: ignore[union-attr]
            )
        except KeyError:
            return super().weights
        return row_w1, row_w2, col_w1, col_w2  # type: ignore[return-value]
