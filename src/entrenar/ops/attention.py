"""Causal attention over grouped heads and packed documents, with a derived backward.

For one head with queries q (T, K), keys k and values v (S, K), scale c, and S - T earlier keys (a cache):

    s_ij = c q_i · k_j        where j ≤ i + S - T, else s_ij = -∞         (1)
    l_i  = log Σ_j exp(s_ij)                                              (2)
    p_ij = exp(s_ij - l_i)                                                (3)
    o_i  = Σ_j p_ij v_j                                                   (4)

Backward, with do = dLoss/do. The softmax's Jacobian needs Σ_j p_ij dp_ij, which by (4) is do_i · o_i
(Dao et al. 2022, arXiv:2205.14135), so a block of queries needs nothing of the others:

    dp_ij = do_i · v_j                                                    (5)
    ds_ij = p_ij (dp_ij - do_i · o_i)                                     (6)
    dq_i  = c Σ_j ds_ij k_j                                               (7)
    dk_j  = c Σ_i ds_ij q_i                                               (8)
    dv_j  = Σ_i p_ij do_i                                                 (9)

Grouped heads (Ainslie et al. 2023, arXiv:2305.13245): the H/G query heads of a group are stacked as rows of one matrix,
so (1)-(9) hold as they stand, nothing is repeated, and (8) and (9) sum over the group by themselves.

Two paths compute this. `AttentionFunction` is (1)-(9) by blocks of queries. `attention` calls torch's fused kernels,
which are measured to be faster, and has the former as its oracle. Packed documents are cut apart before they see them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from entrenar.errors import DataError
from entrenar.ops.documents import Documents, DocumentSpans
from entrenar.ops.first_order import refuse_double_backward

Piece = tuple[slice, slice, slice]


def causal_mask(num_queries: int, num_keys: int, device: torch.device | None = None) -> Tensor:
    """Return the (T, S) mask that is true where a query may see a key, the last query aligned to the last key."""
    allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return allowed.tril(num_keys - num_queries)


def reference_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S K"],
    *,
    scale: float | None = None,
    documents: Documents | None = None,
) -> Float[Tensor, "B H T K"]:
    """Attend with one dense (T, S) softmax per head, in plain torch with autograd."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    allowed = causal_mask(q.shape[2], k.shape[2], q.device)
    if documents is not None:
        allowed = allowed & (documents.ids[:, :, None] == documents.ids[:, None, :])[:, None]
    repeats = q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).repeat_interleave(repeats, dim=1) for x in (k, v))  # (B, H, S, K)
    scores = (q.to(wide) @ keys.mT * scale).masked_fill(~allowed, -math.inf)
    return (torch.softmax(scores, dim=-1) @ values).to(q.dtype)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out and the log-sum-exp of equations (1) to (4); `hidden` is true where a query may not see a key."""
    scores = (q @ k.mT * scale).masked_fill(hidden, -math.inf)  # (1)
    shift = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - shift)
    total = weights.sum(-1, keepdim=True)
    return weights @ v / total, torch.log(total) + shift  # (3), (4) and (2)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, hidden: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of equations (5) to (9) for one block of queries and the keys that it sees."""
    scores = (q @ k.mT * scale).masked_fill(hidden, -math.inf)  # (1)
    probabilities = torch.exp(scores - logsumexp)  # (3)
    dprobabilities = dout @ v.mT  # (5)
    dscores = probabilities * (dprobabilities - (dout * out).sum(-1, keepdim=True))  # (6)
    dq = dscores @ k * scale  # (7)
    dk = dscores.mT @ q * scale  # (8)
    dv = probabilities.mT @ dout  # (9)
    return dq, dk, dv


class AttentionFunction(torch.autograd.Function):
    """`attention_forward` and `attention_backward` on the tape, a block of queries at a time.

    Saved: q, k, v, out and the log-sum-exp. The probabilities are recomputed, so memory grows with T, not T².
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, block_size: int) -> Tensor:
        """Compute the output and save what the backward needs."""
        wide = torch.promote_types(q.dtype, torch.float32)
        keys, values = k.to(wide), v.to(wide)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        logsumexp = q.new_empty((*q.shape[:3], 1), dtype=wide)
        for block, seen in query_blocks(q.shape[2], k.shape[2], block_size):
            queries = group_heads(q[:, :, block].to(wide), k.shape[1])
            hidden = hidden_keys(queries.shape[2], block, seen, k)
            block_out, block_lse = attention_forward(queries, keys[:, :, :seen], values[:, :, :seen], hidden, scale)
            out[:, :, block] = ungroup_heads(block_out, q.shape[1])
            logsumexp[:, :, block] = ungroup_heads(block_lse, q.shape[1])
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.scale, ctx.block_size = scale, block_size
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Compute the gradients that are wanted."""
        refuse_double_backward("attention")
        q, k, v, out, logsumexp = ctx.saved_tensors
        wide, groups = logsumexp.dtype, k.shape[1]
        keys, values = k.to(wide), v.to(wide)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        for block, seen in query_blocks(q.shape[2], k.shape[2], ctx.block_size):
            d, queries, o, lse = (group_heads(t[:, :, block].to(wide), groups) for t in (dout, q, out, logsumexp))
            hidden = hidden_keys(queries.shape[2], block, seen, k)
            block_dq, block_dk, block_dv = attention_backward(
                d, queries, keys[:, :, :seen], values[:, :, :seen], o, lse, hidden, ctx.scale
            )
            dq[:, :, block] = ungroup_heads(block_dq, q.shape[1])
            dk[:, :, :seen] += block_dk
            dv[:, :, :seen] += block_dv
        grads = (dq, dk.to(k.dtype), dv.to(v.dtype))
        needed = [grad if needs else None for grad, needs in zip(grads, ctx.needs_input_grad[:3], strict=True)]
        return needed[0], needed[1], needed[2], None, None


def query_blocks(num_queries: int, num_keys: int, block_size: int) -> list[tuple[slice, int]]:
    """Return the blocks of queries, each with the number of keys that its last query sees."""
    starts = range(0, num_queries, block_size)
    ends = [min(start + block_size, num_queries) for start in starts]
    return [(slice(start, end), end + num_keys - num_queries) for start, end in zip(starts, ends, strict=True)]


def hidden_keys(num_rows: int, block: slice, seen: int, k: Tensor) -> Tensor:
    """Return the (H/G · T, seen) mask of a block of queries: true where a row may not see a key."""
    block_length = block.stop - block.start
    hidden = ~causal_mask(block_length, seen, k.device)
    return hidden.expand(num_rows // block_length, *hidden.shape).reshape(num_rows, seen)


def group_heads(x: Tensor, groups: int) -> Tensor:
    """Stack the heads of each group as rows: (B, H, T, K) to (B, G, H/G · T, K)."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups * x.shape[2], x.shape[3])


def ungroup_heads(x: Tensor, heads: int) -> Tensor:
    """Undo `group_heads`."""
    return x.reshape(x.shape[0], heads, x.shape[1] * x.shape[2] // heads, x.shape[3])


def derived_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S K"],
    *,
    scale: float | None = None,
    block_size: int = 128,
) -> Float[Tensor, "B H T K"]:
    """Attend by equations (1) to (9), `block_size` queries at a time."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    apply: Callable[..., Tensor] = AttentionFunction.apply
    return apply(q, k, v, scale, block_size)


class FlashFunction(torch.autograd.Function):
    """Torch's fused CPU kernel and its backward on each span of tokens, in `compute_dtype`.

    Saved: q, k, v and out in their own dtype, and the log-sum-exp. They are widened a span or row at a time, so a
    wider `compute_dtype` costs no memory that outlives it.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, spans: DocumentSpans, compute_dtype: torch.dtype
    ) -> Tensor:
        """Compute out; save q, k, v, out and the log-sum-exp of each span."""
        pieces = span_slices(q.shape[0], q.shape[2], spans, by_row=compute_dtype != q.dtype)
        outs, logsumexps = [], []
        for piece in pieces:
            inputs = (kernel_input(x[piece], compute_dtype) for x in (q, k, v))
            out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *inputs, is_causal=True, scale=scale
            )
            outs.append(out.to(q.dtype))
            logsumexps.append(logsumexp)
        out = join(outs, pieces, q)
        ctx.save_for_backward(q, k, v, out, *logsumexps)
        ctx.scale, ctx.pieces, ctx.compute_dtype = scale, pieces, compute_dtype
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        """Compute dq, dk and dv."""
        refuse_double_backward("attention")
        q, k, v, out, *logsumexps = ctx.saved_tensors
        parts = []
        for piece, logsumexp in zip(ctx.pieces, logsumexps, strict=True):
            inputs = (kernel_input(x[piece], ctx.compute_dtype) for x in (dout, q, k, v, out))
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *inputs, logsumexp, 0.0, is_causal=True, scale=ctx.scale
            )
            parts.append([grad.to(q.dtype) for grad in grads])
        dq, dk, dv = (join([part[i] for part in parts], ctx.pieces, x) for i, x in enumerate((q, k, v)))
        return dq, dk, dv, None, None, None


def span_slices(batch: int, time: int, spans: DocumentSpans, *, by_row: bool) -> list[Piece]:
    """Return the index of each document in a (B, H, T, K) tensor; without documents, of each row or of the whole."""
    if not spans and not by_row:
        return [(slice(0, batch), slice(None), slice(0, time))]
    return [
        (slice(row, row + 1), slice(None), slice(start, end))
        for row, ends in enumerate(spans or (((0, time),),) * batch)
        for start, end in ends
    ]


def join(parts: Sequence[Tensor], pieces: Sequence[Piece], like: Tensor) -> Tensor:
    """Put the parts of a tensor back together, in the layout of `like`."""
    if len(parts) == 1:
        return parts[0]
    whole = torch.empty_like(like)
    for part, piece in zip(parts, pieces, strict=True):
        whole[piece] = part
    return whole


def kernel_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in `dtype`, its last dimension contiguous as the kernel assumes."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend by torch's fused kernel; its own causal flag aligns the first query to the first key."""
    queries, keys = q.shape[2], k.shape[2]
    mask = causal_mask(queries, keys, q.device) if 1 < queries < keys else None
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=queries == keys, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def fused_attention_by_document(q: Tensor, k: Tensor, v: Tensor, scale: float, spans: DocumentSpans) -> Tensor:
    """Attend within each document by torch's fused kernel."""
    rows = []
    for row, ends in enumerate(spans):
        lengths = [end - start for start, end in ends]
        pieces = [torch.split(x[row : row + 1], lengths, dim=2) for x in (q, k, v)]
        rows.append(torch.cat([fused_attention(x, y, z, scale) for x, y, z in zip(*pieces, strict=True)], dim=2))
    return torch.cat(rows)


def attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S K"],
    *,
    scale: float | None = None,
    documents: Documents | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Float[Tensor, "B H T K"]:
    """Attend causally: the last query sees the last key, and no token sees another document.

    A CPU multiplies in `compute_dtype`; None, and other devices, mean q's own.

    Raises:
        DataError: H is no multiple of G, there are fewer keys than queries, or documents do not fit q and k.
    """
    check_attention_shapes(q, k, documents)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if q.device.type in ("cpu", "meta") and q.shape[2] == k.shape[2] and q.numel():
        apply: Callable[..., Tensor] = FlashFunction.apply
        return apply(q, k, v, scale, () if documents is None else documents.spans, compute_dtype or q.dtype)
    if documents is None or not q.numel():
        return fused_attention(q, k, v, scale)
    return fused_attention_by_document(q, k, v, scale, documents.spans)


def check_attention_shapes(q: Tensor, k: Tensor, documents: Documents | None) -> None:
    """Refuse shapes that have no meaning here."""
    heads, queries, groups, keys = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    if heads % groups:
        raise DataError(f"query heads must be a multiple of key/value heads, got {heads} and {groups}")
    if keys < queries:
        raise DataError(f"attention needs at least as many keys as queries, got {keys} keys and {queries} queries")
    if documents is not None and (queries != keys or documents.positions.shape != (q.shape[0], queries)):
        raise DataError(
            f"documents must cover each of the (B, T) = {(q.shape[0], queries)} queries and {keys} keys, "
            f"got {tuple(documents.positions.shape)}: a key/value cache and documents exclude each other"
        )
