"""Kinds of blocks of a backbone, as integers: shared with `ops`, which works without Triton."""

# a positive kind is an attention whose weights are lists of so many groups; these are the others
CONVOLUTION, STACKED, FOLDED = 0, -1, -2


def tensors(kind: int) -> int:
    """Tensors of a block: the norm's two, and the mixer's."""
    return 2 + (6 * kind if kind > 0 else {CONVOLUTION: 4, STACKED: 6, FOLDED: 4}[kind])
