from typing import Any, ClassVar

from lomacs_fast import functional, reference


class GatedConv1D(reference.GatedConv1D):
    __doc__ = reference.GatedConv1D.__doc__
    functions: ClassVar[Any] = functional
