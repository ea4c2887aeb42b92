"""A mixture of experts: each token through a few of many MLPs, tokens grouped so that an expert is one product.

X experts, C chosen by each token, S = T * C places; other letters as in runtime/ops.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rolloutd.runtime.inputs import ROW_MULTIPLE
from rolloutd.runtime.ops import Ops
from rolloutd.weights.packing import Experts, Mlp

from .description import MoeConfig

MlpFunction = Callable[[Tensor, Mlp], Tensor]


def mix_experts(moe: MoeConfig, ops: Ops, weights: Experts, h_TE: Tensor, mlp: MlpFunction) -> Tensor:
    """Return each token's mixture of its experts [T, E]; probabilities and their choice are in fp32."""
    logits_TX = ops.linear(h_TE, weights.router)
    chosen_TC, expert_TC = torch.softmax(logits_TX, dim=-1, dtype=torch.float32).topk(moe.num_chosen, dim=-1)
    if moe.normalize:
        chosen_TC = chosen_TC / chosen_TC.sum(dim=-1, keepdim=True)
    if not moe.weights_in_fp32:
        chosen_TC = chosen_TC.to(logits_TX.dtype)
    out_TCE = _through_experts(weights.experts, h_TE, expert_TC, mlp)
    mixed_TE = (out_TCE * chosen_TC[..., None]).sum(dim=1).to(h_TE.dtype)
    if weights.shared is None or weights.shared_gate is None:
        return mixed_TE
    return mixed_TE + ops.sigmoid(ops.linear(h_TE, weights.shared_gate)) * mlp(h_TE, weights.shared)


def _through_experts(experts: tuple[Mlp, ...], h_TE: Tensor, expert_TC: Tensor, mlp: MlpFunction) -> Tensor:
    """Return what each token's experts make of it, [T, C, E] in the experts' dtype."""
    num_chosen = expert_TC.shape[1]
    expert_S = expert_TC.flatten()
    order_S = expert_S.argsort(stable=True)
    counts = torch.bincount(expert_S, minlength=len(experts)).tolist()
    out_SE = h_TE.new_empty((expert_S.shape[0], h_TE.shape[1]), dtype=experts[0].down.weight.dtype)
    for places, expert in zip(torch.split(order_S, counts), experts, strict=True):
        num_rows = places.shape[0]
        if num_rows:
            rows = F.pad(h_TE[places // num_chosen], (0, 0, 0, -num_rows % ROW_MULTIPLE))
            out_SE[places] = mlp(rows, expert)[:num_rows]
    return out_SE.view(*expert_TC.shape, -1)
