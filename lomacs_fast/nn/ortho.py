from typing import Any, ClassVar

from lomacs_fast import functional, reference


class NeuralOrthoRefiner(reference.NeuralOrthoRefiner):
    __doc__ = reference.NeuralOrthoRefiner.__doc__
    functions: ClassVar[Any] = functional
