"""FlashInfer's products in torch, with the signatures and the rules of flashinfer-python 0.6.13's kernels.

They compute in float64 what its documentation says of their arguments, from memory as its kernels read it.
"""

from types import SimpleNamespace

import torch

from quant import formats
from quant.key import FP4, FP8

CALLED: list[tuple] = []  # (function, rows)


def gemm_fp8_nt_groupwise(
    a, b, a_scale, b_scale, scale_major_mode=None, mma_sm=1, scale_granularity_mnk=(1, 128, 128), out=None,
    out_dtype=None, backend="cutlass",
):  # fmt: skip
    (rows, cols), outs = a.shape, b.shape[0]
    CALLED.append(("gemm_fp8_nt_groupwise", rows))
    assert (scale_major_mode, scale_granularity_mnk, mma_sm, backend) == ("K", (1, 128, 128), 1, "cutlass")
    assert a.dtype == b.dtype == FP8
    assert cols % 128 == outs % 16 == 0
    assert (a_scale.shape, b_scale.shape) == ((rows, cols // 128), ((outs + 127) // 128, cols // 128))
    for tensor in a, b, a_scale, b_scale, out:  # its kernels look at sizes and pointers only
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0 or tensor.dtype == torch.float32
    assert (out.shape, out_dtype) == ((rows, outs), None)
    assert out.dtype in (torch.bfloat16, torch.float16)
    x = a.double() * a_scale.double().repeat_interleave(128, 1)
    w = b.double() * b_scale.double().repeat_interleave(128, 0)[:outs].repeat_interleave(128, 1)
    return out.copy_(x @ w.t())


def mm_fp4(
    a, b, a_descale, b_descale, alpha=None, out_dtype=torch.bfloat16, out=None, block_size=16, use_8x4_sf_layout=False,
    backend="auto", use_nvfp4=True, enable_pdl=True,
):  # fmt: skip
    (rows, cols), outs = a.shape, b.shape[1]
    CALLED.append(("mm_fp4", rows))
    assert (alpha, block_size, use_8x4_sf_layout, backend, use_nvfp4) == (None, 32, False, "cudnn", False)
    assert a.dtype == b.dtype == a_descale.dtype == b_descale.dtype == torch.uint8
    assert (a.stride(), b.stride()) == ((cols, 1), (1, cols))
    assert (out.shape, out.dtype) == ((rows, outs), out_dtype)
    assert out.is_contiguous()
    assert out_dtype in (torch.bfloat16, torch.float16)
    values = [operand(a, a_descale), operand(b.t(), b_descale.t())]
    return out.copy_(values[0] @ values[1].t())


def operand(codes, scale):
    """float64 of FP4 codes with e8m0 scales in tiles of 128 x 4."""
    rows, groups = codes.shape[0], codes.shape[1] // 16
    assert scale.shape == ((rows + 127) // 128 * 128, (groups + 3) // 4 * 4)
    assert scale.is_contiguous()
    tiles = scale.reshape(-1, scale.shape[1] // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    exponents = tiles.reshape(scale.shape)[:rows, :groups].int() - 127
    return formats.decode(codes, FP4).double() * formats.power(exponents).double().repeat_interleave(32, 1)


NAMES = {"fp8_block": "gemm_fp8_nt_groupwise", "mxfp4": "mm_fp4"}  # by scheme
LIBRARY = SimpleNamespace(gemm=SimpleNamespace(gemm_fp8_nt_groupwise=gemm_fp8_nt_groupwise, mm_fp4=mm_fp4))
