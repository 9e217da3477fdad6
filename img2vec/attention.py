"""A transformer block computed for its last tokens only, which are those that the decoder reads."""

from typing import Any

import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def last_tokens(block: Block, tokens: Tensor, count: int) -> Tensor:
    """The last `count` tokens of block(tokens): (B, N, D) to (B, count, D).

    The same numbers, without computing queries and MLP for tokens that are not used.
    """
    last = tokens[:, -count:] + _last_attended(block.attn, block.norm1(tokens), count)
    return last + block.mlp(block.norm2(last))


def _last_attended(attention: Any, normed: Tensor, count: int) -> Tensor:
    """The last `count` tokens of attention(normed); a function, so that its scores are freed before the MLP."""
    D = normed.shape[2]
    heads, width = attention.num_heads, attention.head_dim
    weight, bias = attention.qkv.weight, attention.qkv.bias
    queries = F.linear(normed[:, -count:], weight[:D], bias[:D])
    queries = queries.unflatten(2, (heads, width)).transpose(1, 2)
    keys_values = F.linear(normed, weight[D:], bias[D:]).unflatten(2, (2, heads, width))
    keys, values = keys_values.permute(2, 0, 3, 1, 4).unbind(0)
    if attention.fused_attn:
        attended = F.scaled_dot_product_attention(queries, keys, values)
    else:
        # The scores are computed again in the backward pass: keeping them would take the most memory here.
        attended = checkpoint(
            _attend,
            queries * attention.scale,
            keys,
            values,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return attention.proj(attended.transpose(1, 2).flatten(2))


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (queries @ keys.transpose(2, 3)).softmax(dim=3) @ values
