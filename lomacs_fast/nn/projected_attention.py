from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lomacs_fast import functional, reference


def _linear_weights(linears: nn.ModuleList) -> list[Tensor]:
    # past the lookup by name, which costs more than a small sample; a parametrised weight takes it
    found = []
    for linear in linears._modules.values():
        weight = linear._parameters.get("weight")
        found.append(linear.weight if weight is None else weight)
    return found  # type: ignore[return-value]


def _projections(projections: nn.ParameterList) -> list[Tensor]:
    values = list(projections._parameters.values())
    return values if len(values) == len(projections) else list(projections)  # type: ignore[return-value]


class GroupedProjectedAttention(reference.GroupedProjectedAttention):
    __doc__ = reference.GroupedProjectedAttention.__doc__
    functions: ClassVar[Any] = functional

    @property
    def weights(self) -> tuple[Sequence[Tensor], ...]:
        m = self._modules
        linears = tuple(_linear_weights(m[name]) for name in ("qs", "ks", "vs", "os"))  # type: ignore[arg-type]
        return (*linears, _projections(m["Pk"]), _projections(m["Pv"]))  # type: ignore[arg-type]
