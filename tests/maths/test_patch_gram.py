"""The Gram of patches that are moved is the Gram of patches that are unfolded."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from rankfold.maths.linalg import mirrored
from rankfold.maths.patch_gram import add_patch_gram
from tests.cases import normal

TAPS, DILATIONS = st.tuples(*[st.integers(1, 5)] * 2), st.tuples(*[st.integers(1, 3)] * 2)


@settings(max_examples=60, deadline=None)
@given(
    kernel=TAPS,
    dilation=DILATIONS,
    stride=st.integers(1, 3),
    across=st.booleans(),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 16), st.integers(1, 16)),
    sign=st.sampled_from([1, -1]),
)
def test_moved_patches_have_the_gram_of_unfolded_ones(kernel, dilation, stride, across, size, sign):
    spans = [s - d * (k - 1) for s, d, k in zip(size[2:], dilation, kernel, strict=True)]
    assume(min(spans) > 0)
    images, side = normal(0, *size).double(), size[1] * kernel[0] * kernel[1]
    strides = (stride, 1) if across else (1, stride)
    rows = functional.unfold(images, kernel, dilation=dilation, stride=strides)
    rows = rows.transpose(1, 2).flatten(0, 1)
    start = normal(1, side, side).double()

    upper = start.clone()
    add_patch_gram(upper, images, kernel, dilation, stride, across=across, sign=sign)

    torch.testing.assert_close(
        mirrored(upper - start), sign * (rows.T @ rows), rtol=1e-10, atol=1e-10
    )
    assert torch.equal(upper.tril(-1), start.tril(-1))  # what lies there is the first half's
