from typing import Any, ClassVar

from lomacs_fast import functional, reference


class AEPlusLoss(reference.AEPlusLoss):
    __doc__ = reference.AEPlusLoss.__doc__
    functions: ClassVar[Any] = functional
