"""Number formats in pure torch: what every code and every scale must be (lead's stand-in)."""
import torch
from torch import Tensor
from .key import E8M0, FP4, FP8, FP8_FNUZ, QuantKey, ScaleDesc, ScaleLayout

def _up(n, m): return -(-n // m) * m

def encode_e4m3(y):
    y = y.clamp(-448, 448)
    c = y.to(FP8).view(torch.uint8)
    return torch.where(y.isnan(), 0x7F, c).to(torch.uint8).view(FP8)

def quantize(x, key, *, scale=None, scale2=None, zero_point=None, scale_ub=None):
    rows = x.float().reshape(-1, x.shape[-1])
    T, N = rows.shape
    given = scale
    def groups(r, fill=0.0):
        if key.per_tensor: return r.reshape(1, -1)
        G = key.group_size(N); K = key.groups(N)
        return torch.nn.functional.pad(r, (0, K*G-N), value=fill).reshape(T, K, G)
    g = groups(rows)
    amax = g.view(torch.int32).bitwise_and(0x7FFFFFFF)
    amax = (amax.amax(-1) if amax.numel() else amax.new_zeros(amax.shape[:-1])).view(torch.float32)
    bad = ~amax.isfinite()
    int8 = key.dtype == torch.int8
    if key.scale.static:
        s = scale.reshape(1,1,1) if not key.per_tensor else scale.reshape(1,1)
        v = g * (1/s)
        s_out = scale
    elif key.scale.dtype == torch.float32:
        lim = 127.0 if int8 else 448.0
        if scale_ub is not None: amax = torch.minimum(amax, scale_ub)
        s = (amax/lim).clamp_min(2.0**-23 if int8 else 1/(448*512))
        s = torch.where(bad, float("nan"), s)
        v = g*(1/s).unsqueeze(-1); s_out = s.reshape(1) if key.per_tensor else s
    else:
        raise NotImplementedError
    if int8:
        c = v.round().clamp(-128,127); data = torch.where(c.isnan(), 0, c).to(torch.int8)
    else:
        data = encode_e4m3(v)
    data = data.view(torch.uint8).reshape(T, N if key.per_tensor else key.groups(N)*key.group_size(N))[:, :N].contiguous().view(key.dtype).reshape(x.shape)
    return data, s_out, None

def dequantize(data, scale, key, *, scale2=None, zero_point=None):
    rows = data.float().reshape(-1, data.shape[-1]); N = rows.shape[1]
    if scale.numel() == 1 and scale.ndim == 1: return (rows*scale).reshape(data.shape)
    return (rows * scale.repeat_interleave(key.group_size(N), 1)[:, :N]).reshape(data.shape)

def empty(shape, key, device):
    data = torch.empty(shape, dtype=key.storage_dtype, device=device)
    if key.scale.static: return data, None, None
    T = 1
    for n in shape[:-1]: T = T*n
    if key.per_tensor: return data, torch.empty(1, device=device), None
    return data, torch.empty((T, key.groups(shape[-1])), device=device), None
