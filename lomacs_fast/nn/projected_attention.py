from typing import Any, ClassVar

from lomacs_fast import functional, reference


class GroupedProjectedAttention(reference.GroupedProjectedAttention):
    __doc__ = reference.GroupedProjectedAttention.__doc__
    functions: ClassVar[Any] = functional
