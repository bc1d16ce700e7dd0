from typing import Any, ClassVar

from lomacs_fast import functional, reference


class AxialLowRankFreqGate(reference.AxialLowRankFreqGate):
    __doc__ = reference.AxialLowRankFreqGate.__doc__
    functions: ClassVar[Any] = functional
