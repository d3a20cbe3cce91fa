"""FlashInfer's products of linear layers, for GPUs where torch has none: `linear_products` says which.

    y = round_S(sum_k x_k * w_k)        S: bfloat16 or float16, sums in float32

They give neither promise 2 (a row never depends on its neighbours) nor 3 (run twice, same bits), which FlashInfer
doesn't state. Its workspace, one a device, is shared by streams: don't call them on two at once.

Written for flashinfer-python 0.6.13; others serve that have the same parameters. It compiles `gemm_fp8_nt_groupwise`
at the first call, and cuDNN plans `mm_fp4` for each new number of rows (with cuDNN 9.21 once).
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from . import _flashinfer

CALLS = {  # as in `_flashinfer`
    ("gemm", "gemm_fp8_nt_groupwise"): "a b a_scale b_scale * scale_major_mode scale_granularity_mnk out backend",
    ("gemm", "mm_fp4"): "a b a_descale b_descale * out_dtype out block_size backend use_nvfp4",
}
CUDNN = 91400  # from which on it has MXFP4 for all of Blackwell


@cache
def missing(name: str) -> str:
    """What must be installed for FlashInfer's function of this name, or nothing."""
    if reason := _flashinfer.missing({call: taken for call, taken in CALLS.items() if call[1] == name}):
        return reason
    if name == "mm_fp4" and not importlib.util.find_spec("cudnn"):
        return "cuDNN's frontend: pip install nvidia-cudnn-frontend"
    if name == "mm_fp4" and (found := torch.backends.cudnn.version() or 0) < CUDNN:
        return f"cuDNN 9.14 or later ({found} is here)"
    return ""


def _groupwise(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, out: Tensor) -> None:
    """Of float32 scales [M, K / 128] and [ceil(N / 128), K / 128], both row-major ("K")."""
    options = {"scale_major_mode": "K", "scale_granularity_mnk": (1, 128, 128), "backend": "cutlass"}
    _flashinfer.library().gemm.gemm_fp8_nt_groupwise(x, w, x_scale, w_scale, out=out, **options)


def _mxfp4(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, out: Tensor) -> None:
    """Of swizzled scales, as matrices of whole tiles."""
    tiles = [
        scale.view(torch.uint8).view((codes.shape[0] + 127) // 128 * 128, -1)
        for codes, scale in ((x, x_scale), (w, w_scale))
    ]
    options = {"out_dtype": out.dtype, "block_size": 32, "use_nvfp4": False, "backend": "cudnn"}
    _flashinfer.library().gemm.mm_fp4(x, w.t(), tiles[0], tiles[1].t(), out=out, **options)


RUN = {"gemm_fp8_nt_groupwise": _groupwise, "mm_fp4": _mxfp4}
