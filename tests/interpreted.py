"""What kernels do where they are interpreted: how often each number is loaded."""

import pytest
import torch


def counted(call, x):
    """How often each number of x is loaded by each program of an interpreted call: `{program: counts}`."""
    from triton.runtime import interpreter

    builder, found = interpreter.interpreter_builder, {}
    load = builder.create_masked_load

    def create(pointers, mask, *rest):
        at = (pointers.data.astype("int64") - x.data_ptr())[mask.data] // x.element_size()
        at = torch.from_numpy(at[(at >= 0) & (at < x.numel())])
        counts = found.setdefault(builder.grid_idx[0], torch.zeros(x.numel(), dtype=torch.int64))
        counts += torch.bincount(at, minlength=x.numel())
        return load(pointers, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", create)
        call()
    return {program: counts.view(x.shape) for program, counts in found.items()}
