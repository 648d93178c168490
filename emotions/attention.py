"""DeBERTa's disentangled attention (arXiv 2006.03654) with the same results in fewer operations.

B batch, T tokens, H heads, D head size, C = H * D, P relative rows that occur, W columns of relative scores

With d = i - j and row(d) that distance's row of the relative embeddings, the paper's equation 4 is

    score[i, j] = (q_i . k_j  +  q_i . K_r[row(d)]  +  k_j . Q_r[row(d)]) / sqrt(3 D)
                   content       content-to-position   position-to-content

transformers projects all 512 rows in every layer, repeats them over the batch, multiplies them with every token to two
(B * H, T, 512) tensors and gathers (T, T) out of each; the gather's gradient is a scatter into 512 columns of zeros.
Here only the rows that occur are projected (2T - 1 of them while the log buckets are the identity, T <= 129 in
DeBERTa-v3), in one matrix product with the tokens. They are laid out so that d falls by one from column to column:
score[i, j] stands in column T - 1 - i + j, and a strided view of the relative scores, one column shorter per row, is
the (T, T) matrix ("skewing", arXiv 1809.04281): no gather, and its gradient is a copy. For T = 3 the columns are the
distances 2 1 0 -1 -2; row 0 reads columns 2 3 4 (0 -1 -2), row 1 columns 1 2 3 (1 0 -1), row 2 columns 0 1 2 (2 1 0).

Equal to transformers in fp32 to rounding. Under autocast scores and probabilities have the autocast type throughout.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention, make_log_bucket_position


def use_fast_attention(model: nn.Module) -> int:
    """Replace the forward of every DeBERTa-v2 or -v3 self-attention inside the model; returns how many.

    Parameters and their names stay. share_att_key, position_buckets, max_relative_positions and either or both of c2p
    and p2c are covered exactly; a layer without relative attention or with neither of the two keeps transformers'
    forward and is not counted. So does a call that asks for the attention maps or passes query_states. relative_pos is
    not read: it is taken to be the encoder's own. Call it before fully_shard. Gradients of gradients are not supported.
    """
    attentions = [module for module in model.modules() if isinstance(module, DisentangledSelfAttention)]
    covered = [x for x in attentions if x.relative_attention and {"c2p", "p2c"} & set(x.pos_att_type)]
    for attention in covered:
        attention.__class__ = FastSelfAttention  # not a forward bound to the instance: this copies and pickles
    return len(covered)


class FastSelfAttention(DisentangledSelfAttention):
    """transformers' module, parameters included, with another forward."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, C) -> (B, T, C), None. attention_mask: (B, 1, T, T) or what broadcasts to it, true where seen."""
        if output_attentions or query_states is not None or attention_mask.dim() != 4:
            return super().forward(
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )

        # The tokens, and the rows of the relative embeddings that occur at this length
        batch, length, _ = hidden_states.shape
        device = hidden_states.device
        rows, *columns = relative_rows(length, self.position_buckets, self.max_relative_positions, device)
        relative = self.pos_dropout(rel_embeddings.index_select(0, rows))  # (P, C)
        tokens = hidden_states.flatten(0, 1)  # (B * T, C)
        if torch.is_autocast_enabled(device.type):  # once here instead of once in each projection
            dtype = torch.get_autocast_dtype(device.type)
            tokens, relative = tokens.to(dtype), relative.to(dtype)

        def project(kind: str, content: nn.Module, position: str) -> Tensor:
            """(B * T, C), or with the relative rows below (B * T + P, C)."""
            if kind not in self.pos_att_type:
                return content(tokens)
            if self.share_att_key:
                return content(torch.cat([tokens, relative]))
            return torch.cat([content(tokens), getattr(self, position)(relative)])

        context = DisentangledAttention.apply(
            project("p2c", self.query_proj, "pos_query_proj"),
            project("c2p", self.key_proj, "pos_key_proj"),
            self.value_proj(tokens),
            *columns,
            ~attention_mask.bool().transpose(0, 1),
            (batch, length, self.num_attention_heads),
            self.dropout.p if self.training else 0.0,
        )
        return context.view(batch, length, -1), None


@lru_cache(maxsize=1024)
def relative_rows(length: int, buckets: int, max_positions: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The rows (P) of the relative embeddings that occur, and which of them stand in the W columns: for c2p, for p2c.

    W is 2T - 1 and what a multiple of 8, for tensor cores, takes. Only the first 2T - 1 columns are ever read.
    """
    with torch.inference_mode(False):  # else a first call in inference mode would leave tensors no training can save
        width = (2 * length + 6) // 8 * 8
        distance = (length - 1 - torch.arange(width, device=device)).clamp(min=1 - length)
        distance = torch.cat([distance, -distance])  # p2c's key is the row of its matrix: d rises with the column
        if buckets > 0 and max_positions > 0:
            distance = make_log_bucket_position(distance, buckets, max_positions).long()
        span = buckets if buckets > 0 else max_positions
        rows, columns = (distance + span).clamp(0, 2 * span - 1).unique(return_inverse=True)
        return rows, *columns.chunk(2)


def skew(scores: Tensor) -> Tensor:
    """(..., T, W) -> its view (..., T, T) with view[i, j] = scores[i, T - 1 - i + j]."""
    *batch, length, width = scores.shape
    return scores.as_strided(
        (*batch, length, length), (*scores.stride()[:-2], width - 1, 1), scores.storage_offset() + length - 1
    )


def split_heads(rows: Tensor, batch: int, heads: int) -> Tensor:
    """(B * T, C) -> (H, B, T, D): heads first, so that relative scores are one product per head for the whole batch."""
    return rows.reshape(batch, -1, heads, rows.shape[-1] // heads).permute(2, 0, 1, 3).contiguous()


def merge_heads(states: Tensor) -> Tensor:
    """(H, B, T, D) -> (B * T, C)"""
    return states.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def relative_scores(states: Tensor, relative: Tensor) -> Tensor:
    """(H, B, T, D), (H, W, D) -> (H, B, T, W)"""
    return (states.flatten(1, 2) @ relative.mT).view(*states.shape[:3], -1)


def relative_scores_backward(
    buffer: Tensor, grad: Tensor, states: Tensor, relative: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of skew(relative_scores(states, relative)); buffer: (H, B, T, W), zero outside the view."""
    if relative is None:
        return torch.zeros_like(states), None
    skew(buffer).copy_(grad)
    flat = buffer.flatten(1, 2)  # (H, B * T, W)
    return (flat @ relative).view_as(states), flat.mT @ states.flatten(1, 2)


def join_rows(grad: Tensor, relative: Tensor | None, columns: Tensor, size: int, scale: float) -> Tensor:
    """(H, B, T, D), (H, W, D) -> (size, C): the tokens' rows, then scale * the relative rows, from their columns."""
    heads, batch, length, head_size = grad.shape
    joined = grad.new_empty(size, heads * head_size)
    tokens, rows = joined.split([batch * length, size - batch * length])
    tokens.view(batch, length, heads, head_size).copy_(grad.permute(1, 2, 0, 3))
    if relative is not None:
        rows.zero_().index_add_(0, columns, relative.transpose(0, 1).flatten(1), alpha=scale)
    return joined


def apply_dropout(states: Tensor, keep: Tensor | None, p: float) -> Tensor:
    return states if keep is None else (states * keep).mul_(1 / (1 - p))


class DisentangledAttention(torch.autograd.Function):
    """Softmax attention with the scores above, its gradient by hand: autograd would keep and copy every summand."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        queries: Tensor,  # (B * T, C), or (B * T + P, C) with the projected relative rows for p2c
        keys: Tensor,  # likewise, for c2p
        values: Tensor,  # (B * T, C)
        c2p: Tensor,  # (W) the relative row of each column
        p2c: Tensor,
        hidden: Tensor,  # (1 or H, 1 or B, 1 or T, T) true where not seen
        shape: tuple[int, int, int],
        dropout: float,
    ) -> Tensor:
        batch, length, heads = shape
        # Content and relative rows by head, each (H, B, T, D) and (H, W, D)
        n = batch * length
        q, k, v = (split_heads(x[:n], batch, heads) for x in (queries, keys, values))
        q_rel = split_heads(queries[n:][p2c], 1, heads)[:, 0] if len(queries) > n else None
        k_rel = split_heads(keys[n:][c2p], 1, heads)[:, 0] if len(keys) > n else None

        # Scores: position-to-content, content-to-position, and content in one product with the sum, scaled; in fp16,
        # whose sums overflow at 65,504, each is scaled before
        scale = (q.shape[-1] * (1 + (q_rel is not None) + (k_rel is not None))) ** -0.5
        before, after = (scale, 1.0) if q.dtype == torch.float16 else (1.0, scale)
        scores = None
        if q_rel is not None:  # contiguous first: adding a transposed view is slower
            scores = skew(relative_scores(k, q_rel * before)).mT.contiguous()
        if k_rel is not None:
            position = skew(relative_scores(q, k_rel * before))
            scores = position.contiguous() if scores is None else scores.add_(position)
        scores.flatten(0, 1).baddbmm_(q.flatten(0, 1), k.flatten(0, 1).mT, beta=after, alpha=scale)
        scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)

        # Softmax, dropout, values
        probs = torch.softmax(scores, -1, dtype=scores.dtype)  # a given dtype keeps CUDA's autocast from fp32 copies
        keep = torch.empty_like(probs).bernoulli_(1 - dropout) if dropout else None
        context = apply_dropout(probs, keep, dropout).flatten(0, 1) @ v.flatten(0, 1)
        ctx.save_for_backward(q, k, v, q_rel, k_rel, c2p, p2c, hidden, probs, keep)
        ctx.dropout, ctx.scale, ctx.sizes = dropout, scale, (len(queries), len(keys))
        return merge_heads(context.view_as(q))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, q_rel, k_rel, c2p, p2c, hidden, probs, keep = ctx.saved_tensors
        heads, batch, length, _ = q.shape
        with torch.autocast(q.device.type, enabled=False):  # also for a backward called inside autocast
            # Through values, dropout and softmax to the scores
            grad = split_heads(grad, batch, heads).flatten(0, 1)  # (H * B, T, D)
            d_v = apply_dropout(probs, keep, ctx.dropout).flatten(0, 1).mT @ grad
            d_probs = (grad @ v.flatten(0, 1).mT).view_as(probs)
            d_probs = apply_dropout(d_probs, keep, ctx.dropout)
            d_scores = torch.ops.aten._softmax_backward_data(d_probs, probs, -1, probs.dtype)
            d_scores.masked_fill_(hidden, 0)  # rows of padding, which attend to everything alike
            scale = ctx.scale
            if d_scores.dtype == torch.float16:  # the products below are sums that overflow
                d_scores, scale = d_scores.mul_(scale), 1.0

            # Through each term; a relative score's gradient goes back into the skewed view's place, the columns around
            # it stay zero for both
            content = d_scores.flatten(0, 1)
            relative = q.new_zeros(heads, batch, length, len(c2p))
            d_q, d_k_rel = relative_scores_backward(relative, d_scores, q, k_rel)
            d_k, d_q_rel = relative_scores_backward(relative, d_scores.mT, k, q_rel)
            d_q.flatten(0, 1).baddbmm_(content, k.flatten(0, 1), beta=scale, alpha=scale)
            d_k.flatten(0, 1).baddbmm_(content.mT, q.flatten(0, 1), beta=scale, alpha=scale)
            d_queries = join_rows(d_q, d_q_rel, p2c, ctx.sizes[0], scale)
            d_keys = join_rows(d_k, d_k_rel, c2p, ctx.sizes[1], scale)
        return d_queries, d_keys, merge_heads(d_v.view_as(v)), None, None, None, None, None
