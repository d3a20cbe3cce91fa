"""Promise 2 of products of quantized operands: a row's result depends on nothing but the row."""

import pytest
import torch
from compare import assert_same
from linear_operands import (
    KEYS,
    activation,
    changed,
    compiled_only,
    each_key,
    linear,
    multiple,
    rows,
    run_python,
    weight,
)

from fused_ops.linear import usual_weight


@compiled_only
@pytest.mark.parametrize("cols", [7, 577, 1120])
@each_key
def test_a_row_does_not_depend_on_its_neighbours(key, cols):
    """In a batch of any size, wherever it stands, strided, with leading dimensions, on one thread or two."""
    cols += -cols % multiple(key)
    x, w = activation(260, cols, key), weight(203, cols, usual_weight(key))
    stored = x.data.shape[1]
    whole = linear(x, w)
    for first, size in (0, 1), (131, 1), (259, 1), (1, 2), (2, 3), (5, 4), (250, 5), (7, 33), (3, 256):
        here = slice(first, first + size)
        assert_same(linear(rows(x, here), w), whole[here], f"rows {first} to {first + size}")
    gaps = torch.stack([x.data, x.data], dim=1).flatten(1)[:, :stored]
    assert gaps.stride(0) == 2 * stored
    assert_same(linear(changed(x, data=gaps), w), whole)
    wide = torch.cat([w[0], w[0]], dim=1)[:, :stored]
    assert_same(linear(x, (wide, *w[1:])), whole, "weight with a row stride")
    one = rows(x, slice(3, 4))
    assert_same(linear(changed(one, data=one.data[0]), w), whole[3])
    order = torch.arange(260).unflatten(0, (13, 20)).t().flatten()
    cube = gaps.unflatten(0, (13, 20)).transpose(0, 1)
    assert_same(linear(changed(rows(x, order), data=cube), w).flatten(0, 1), whole[order])
    before = torch.get_num_threads()
    try:
        for threads in 1, 2, 3:
            torch.set_num_threads(threads)
            assert_same(linear(x, w), whole, f"{threads} threads")
            assert_same(linear(rows(x, slice(4, 5)), w), whole[4:5], f"{threads} threads, one row")
    finally:
        torch.set_num_threads(before)


@compiled_only
def test_instruction_sets_give_the_same_bits():
    """Every path, by the portable kernels, AVX2's and AVX-512's where the machine has it, in processes of their own."""
    script = """
import hashlib, torch
from compare import raw
from fused_ops.linear import usual_weight
from linear_operands import COLS, KEYS, MXFP4, MXFP8, WEIGHTS, activation, linear, multiple, weight
torch.manual_seed(0)
def note(digest, x, w):
    digest.update(raw(linear(x, w)).numpy().tobytes())
for key in KEYS:
    digest = hashlib.sha256()
    for cols in COLS:
        for tokens in 1, 2, 3, 4, 8:
            cols += -cols % multiple(key)
            x, w = activation(tokens, cols, key), weight(37, cols, usual_weight(key))
            w[0].view(torch.uint8)[5, cols // 2 // key.packing] = 0xFF  # NaN in FP8
            note(digest, x, w)
    for w_key in WEIGHTS:
        for tokens in 3, 6:
            note(digest, activation(tokens, 256, key), weight(5, 256, w_key))
    print(key, digest.hexdigest())
ends = {"tiny": ((-75, -65), (-80, -70)), "small": ((-50, -44), (-50, -44)), "smaller": ((-51, -44), (-50, -44)),
        "large": ((45, 51), (45, 51)), "huge": ((45, 52), (45, 51))}  # around float32's, and bfloat16's that are used
for end, (of_x, of_w) in ends.items():
    for key in MXFP8, MXFP4:
        digest = hashlib.sha256()
        for w_key in MXFP8, MXFP4:
            for tokens in 4, 40:
                x = activation(tokens, 96, key, exponents=of_x)
                note(digest, x, weight(300, 96, w_key, exponents=of_w))
        print(end, key, digest.hexdigest())
"""
    printed = [run_python(script, FUSED_OPS_ISA=isa) for isa in ("base", "v3", "")]
    assert printed[0] == printed[1] == printed[2]
    assert len(printed[0].splitlines()) == len(KEYS) + 10
