"""The shipped blueprints as somebody would write them in torch: what emitted kernels are compared with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """`k(inputs, parameters)` on inputs of the blueprint's layout, and its dims for a layer of width d."""

    k: Callable[..., Tensor]
    dims: Callable[[int], dict[str, int]]


def bottleneck_adapter(h: Tensor, p: Parameters) -> Tensor:
    return h + F.linear(F.gelu(F.linear(h, p["down_weight"], p["down_bias"])), p["up_weight"], p["up_bias"])


def parallel_adapter(x: Tensor, h: Tensor, p: Parameters) -> Tensor:
    return h + F.linear(F.gelu(F.linear(x, p["down_weight"], p["down_bias"])), p["up_weight"], p["up_bias"])


def lora(x: Tensor, h: Tensor, p: Parameters) -> Tensor:
    return h + F.linear(F.linear(x, p["a"]), p["b"])


def swiglu_ffn(h: Tensor, p: Parameters) -> Tensor:
    return h + F.linear(F.silu(F.linear(h, p["gate_weight"])) * F.linear(h, p["up_weight"]), p["down_weight"])


def residual_mlp(h: Tensor, p: Parameters) -> Tensor:
    normed = F.layer_norm(h, h.shape[-1:], p["norm_weight"], p["norm_bias"])
    return h + F.linear(F.gelu(F.linear(normed, p["in_weight"], p["in_bias"])), p["out_weight"], p["out_bias"])


def gated_residual(h: Tensor, p: Parameters) -> Tensor:
    hidden = F.elu(F.linear(h, p["hidden_weight"], p["hidden_bias"]))
    gate = torch.sigmoid(F.linear(hidden, p["gate_weight"], p["gate_bias"]))
    return h + gate * F.linear(hidden, p["value_weight"], p["value_bias"])


def squeeze_excite(h: Tensor, p: Parameters) -> Tensor:
    """h is [batch, ..., d]."""
    pooled = h.mean(tuple(range(1, h.dim() - 1)), keepdim=True)
    squeezed = F.relu(F.linear(pooled, p["squeeze_weight"], p["squeeze_bias"]))
    return 2 * h * torch.sigmoid(F.linear(squeezed, p["excite_weight"], p["excite_bias"]))


def depthwise_adapter(h: Tensor, p: Parameters) -> Tensor:
    """h is [batch, height, width, d], which the convolution takes as channels-last memory."""
    image = h.permute(0, 3, 1, 2)
    z = F.conv2d(image, p["depth_weight"][:, None], p["depth_bias"], padding=1, groups=h.shape[-1])
    z = z.permute(0, 2, 3, 1)
    return h + F.linear(F.gelu(F.linear(z, p["down_weight"], p["down_bias"])), p["up_weight"], p["up_bias"])


def conv3x3(x: Tensor, p: Parameters) -> Tensor:
    return F.conv2d(x.permute(0, 3, 1, 2), p["weight"], p["bias"], padding=1).permute(0, 2, 3, 1)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def _attended(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    found = F.scaled_dot_product_attention(_heads(q, heads), _heads(k, heads), _heads(v, heads))
    return found.transpose(-2, -3).flatten(-2)


def multi_head_attention(x: Tensor, p: Parameters) -> Tensor:
    q, k, v = F.linear(x, p["in_proj_weight"], p["in_proj_bias"]).chunk(3, -1)
    return F.linear(_attended(q, k, v, 4), p["out_proj_weight"], p["out_proj_bias"])


def low_rank_attention(h: Tensor, p: Parameters) -> Tensor:
    q, k, v = F.linear(h, p["down_weight"]).chunk(3, -1)
    return h + F.linear(_attended(q, k, v, 2), p["up_weight"], p["up_bias"])


CASES: dict[str, Case] = {
    "linear": Case(lambda x, p: F.linear(x, p["weight"], p["bias"]), lambda d: {"d": d, "d_in": d}),
    "conv1x1": Case(lambda x, p: F.linear(x, p["weight"], p["bias"]), lambda d: {"d": d, "d_in": d}),
    "conv3x3": Case(conv3x3, lambda d: {"d": d, "d_in": d}),
    "layernorm": Case(lambda x, p: F.layer_norm(x, x.shape[-1:], p["weight"], p["bias"]), lambda d: {"d": d}),
    "rmsnorm": Case(lambda x, p: F.rms_norm(x, x.shape[-1:], p["weight"], 1e-6), lambda d: {"d": d}),
    "multi_head_attention": Case(multi_head_attention, lambda d: {"d": d, "heads": 4}),
    "bottleneck_adapter": Case(bottleneck_adapter, lambda d: {"d": d, "r": 16}),
    "parallel_adapter": Case(parallel_adapter, lambda d: {"d": d, "d_in": d, "r": 16}),
    "lora": Case(lora, lambda d: {"d": d, "d_in": d, "r": 8}),
    "swiglu_ffn": Case(swiglu_ffn, lambda d: {"d": d, "hidden_width": 128}),
    "residual_mlp": Case(residual_mlp, lambda d: {"d": d, "hidden_width": 128}),
    "squeeze_excite": Case(squeeze_excite, lambda d: {"d": d, "r": 16}),
    "depthwise_adapter": Case(depthwise_adapter, lambda d: {"d": d, "r": 16}),
    "gated_residual": Case(gated_residual, lambda d: {"d": d, "r": 32}),
    "channel_scale": Case(lambda h, p: h * p["factor"] + p["shift"], lambda d: {"d": d}),
    "low_rank_attention": Case(low_rank_attention, lambda d: {"d": d, "r": 32, "heads": 2}),
}
