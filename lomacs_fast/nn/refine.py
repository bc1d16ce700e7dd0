from typing import Any, ClassVar

from lomacs_fast import functional, reference


class SpectralRefiner(reference.SpectralRefiner):
    __doc__ = reference.SpectralRefiner.__doc__
    functions: ClassVar[Any] = functional
