"""FlashInfer's wrappers in torch, with the signatures and the rules of flashinfer-python 0.6.13.

They compute what its documentation says of their arguments, one request at a time, in float64.
"""

from types import SimpleNamespace

import torch

VERSION = "0.6.13"
PLANNED: list[str] = []  # the wrappers that were planned, by name


def numbers(tensor):
    assert tensor.dtype == torch.int32
    assert tensor.ndim == 1
    return tensor.tolist()


class Wrapper:
    """What the three have in common: pages of requests."""

    def __init__(self, float_workspace_buffer):
        assert float_workspace_buffer.dtype == torch.uint8
        assert not float_workspace_buffer.any()
        self.dtypes = None

    def requests(self, qo_indptr, kv_indptr, kv_indices, kv_lens, page_size):
        PLANNED.append(type(self).__name__)
        starts, pages, indices, lengths = map(numbers, (qo_indptr, kv_indptr, kv_indices, kv_lens))
        assert starts[0] == pages[0] == 0
        assert (len(starts), pages[-1]) == (len(pages), len(indices))
        self.total, self.page_size, self.each = starts[-1], page_size, []
        for i, length in enumerate(lengths):
            own = indices[pages[i] : pages[i + 1]]
            assert len(own) == -(-length // page_size)
            assert 1 <= starts[i + 1] - starts[i] <= length
            self.each.append((slice(*starts[i : i + 2]), own, length))

    def keeps(self, *dtypes):
        """The kernels of the first plan stay."""
        assert self.dtypes in (None, dtypes)
        self.dtypes = dtypes

    def rows(self, cache, pages, length):
        assert cache.shape[1] == self.page_size
        assert 0 <= min(pages) <= max(pages) < len(cache)
        return cache[torch.tensor(pages)].flatten(0, 1)[:length].double()

    def weights(self, logits, causal, window_left):
        """Of [heads, queries, keys]: the window counts the keys before a query's own."""
        _, queries, keys = logits.shape
        own = torch.arange(keys - queries, keys)[:, None]
        place = torch.arange(keys)
        seen = (place <= own) | (not causal)
        seen &= (window_left < 0) | (place >= own - window_left)
        return logits.masked_fill(~seen, float("-inf")).softmax(-1)


class PagedWrapper(Wrapper):
    def attend(self, q, paged_kv_cache, k_scale, v_scale, causal):
        k_cache, v_cache = paged_kv_cache
        heads, kv_heads, size = self.sizes
        assert q.shape == (self.total, heads, size)
        assert (q.dtype, k_cache.dtype) == self.dtypes
        assert q.stride(-1) == 1
        assert k_cache.stride() == v_cache.stride()
        assert k_cache.shape == v_cache.shape
        assert k_cache.shape[1:] == (self.page_size, kv_heads, size)
        for tensor in q, k_cache, v_cache:
            assert not any(stride * tensor.element_size() % 16 for stride in tensor.stride()[:-1])
            assert tensor.data_ptr() % 16 == 0
        assert all(scale is None or type(scale) is float for scale in (k_scale, v_scale))
        out = torch.full(q.shape, float("nan"), dtype=q.dtype)
        for rows, pages, length in self.each:
            k, v = (self.rows(c, pages, length).repeat_interleave(heads // kv_heads, 1) for c in (k_cache, v_cache))
            logits = torch.einsum("qhd,khd->hqk", q[rows].double(), k) * self.scale * (k_scale or 1.0)
            if self.soft_cap:
                logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
            out[rows] = torch.einsum("hqk,khd->qhd", self.weights(logits, causal, self.window_left), v).to(q.dtype)
        return out if v_scale is None else out.mul_(v_scale)


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
        paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None,
        mask_indptr_buf=None, backend="auto", jit_args=None, jit_kwargs=None,
    ):  # fmt: skip
        assert (kv_layout, use_cuda_graph, backend) == ("NHD", False, "auto")
        super().__init__(float_workspace_buffer)

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None, o_data_type=None,
        non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0,
        max_item_len_ptr=None, seq_lens=None, seq_lens_q=None, block_tables=None, max_token_per_sequence=None,
        max_sequence_kv=None, fixed_split_size=None, disable_split_kv=False,
    ):  # fmt: skip
        assert (pos_encoding_mode, head_dim_vo, custom_mask) == ("NONE", None, None)
        lengths = lengths_of(paged_kv_indptr, paged_kv_last_page_len, page_size)
        self.requests(qo_indptr, paged_kv_indptr, paged_kv_indices, lengths, page_size)
        self.keeps(q_data_type, kv_data_type)
        self.sizes, self.causal, self.scale = (num_qo_heads, num_kv_heads, head_dim_qk), causal, sm_scale
        self.window_left, self.soft_cap = window_left, logits_soft_cap

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None,
        return_lse=False, enable_pdl=None, window_left=None, sinks=None, kv_cache_sf=None,
        skip_softmax_threshold_scale_factor=None,
    ):  # fmt: skip
        assert (args, q_scale, out, sinks) == ((), None, None, None)
        return self.attend(q, paged_kv_cache, k_scale, v_scale, self.causal)


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False,
        paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None, backend="auto",
        jit_args=None,
    ):  # fmt: skip
        assert (kv_layout, use_cuda_graph, use_tensor_cores, backend) == ("NHD", False, True, "auto")
        super().__init__(float_workspace_buffer)

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None,
        o_data_type=None, data_type=None, sm_scale=None, rope_scale=None, rope_theta=None, non_blocking=True,
        block_tables=None, seq_lens=None, fixed_split_size=None, disable_split_kv=False, q_len_per_req=1,
    ):  # fmt: skip
        assert (pos_encoding_mode, data_type, q_len_per_req) == ("NONE", None, 1)
        singles = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        self.requests(singles, indptr, indices, lengths_of(indptr, last_page_len, page_size), page_size)
        self.keeps(q_data_type, kv_data_type)
        self.sizes, self.scale = (num_qo_heads, num_kv_heads, head_dim), sm_scale
        self.window_left, self.soft_cap = window_left, logits_soft_cap

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None,
        return_lse=False, enable_pdl=None, window_left=None, sinks=None, q_len_per_req=None,
        skip_softmax_threshold_scale_factor=None, kv_cache_sf=None,
    ):  # fmt: skip
        assert (args, q_scale, out, sinks, q_len_per_req) == ((), None, None, None, None)
        return self.attend(q, paged_kv_cache, k_scale, v_scale, False)


class BatchMLAPagedAttentionWrapper(Wrapper):
    def __init__(
        self, float_workspace_buffer, use_cuda_graph=False, qo_indptr=None, kv_indptr=None, kv_indices=None,
        kv_len_arr=None, backend="auto",
    ):  # fmt: skip
        assert (use_cuda_graph, backend) == (False, "auto")
        super().__init__(float_workspace_buffer)

    def plan(
        self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal,
        sm_scale, q_data_type, kv_data_type, use_profiler=False,
    ):  # fmt: skip
        assert (head_dim_ckv, head_dim_kpe) == (512, 64)
        self.requests(qo_indptr, kv_indptr, kv_indices, kv_len_arr, page_size)
        self.keeps(q_data_type, kv_data_type)
        self.heads, self.causal, self.scale = num_heads, causal, sm_scale

    def run(
        self, q_nope, q_pe, ckv_cache, kpe_cache, out=None, lse=None, return_lse=False, profiler_buffer=None,
        kv_len=None, page_table=None, return_lse_base_on_e=False, o_scale=None,
    ):  # fmt: skip
        assert out is o_scale is None
        assert q_nope.shape == (self.total, self.heads, 512)
        assert q_pe.shape == (self.total, self.heads, 64)
        assert self.dtypes == (q_nope.dtype, ckv_cache.dtype) == (q_pe.dtype, kpe_cache.dtype)
        for tensor in q_nope, q_pe, ckv_cache, kpe_cache:
            assert not any(stride * tensor.element_size() % 16 for stride in tensor.stride()[:-1])
            assert tensor.data_ptr() % 16 == 0
        result = torch.full(q_nope.shape, float("nan"), dtype=q_nope.dtype)
        for rows, pages, length in self.each:
            c, pe = (self.rows(cache, pages, length) for cache in (ckv_cache, kpe_cache))
            logits = torch.einsum("qhr,kr->hqk", q_nope[rows].double(), c)
            logits = (logits + torch.einsum("qhd,kd->hqk", q_pe[rows].double(), pe)) * self.scale
            weights = self.weights(logits, self.causal, -1)
            result[rows] = torch.einsum("hqk,kr->qhr", weights, c).to(result.dtype)
        return result


def lengths_of(kv_indptr, last_page_len, page_size):
    assert 1 <= last_page_len.min() <= last_page_len.max() <= page_size
    return (kv_indptr[1:] - kv_indptr[:-1] - 1) * page_size + last_page_len


CLASSES = (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchDecodeWithPagedKVCacheWrapper,
    BatchMLAPagedAttentionWrapper,
)
LIBRARY = SimpleNamespace(**{each.__name__: each for each in CLASSES})
