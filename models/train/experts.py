"""A mixture of experts that llama.cpp's `llama` architecture (Mixtral) computes the same way.

The gate's softmax runs over all experts in float32; the chosen experts' shares are divided by their sum
(llama.cpp: `build_moe_ffn` with LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX and `norm_w`).
"""
from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

# An expert's rows are padded to a multiple: oneDNN compiles a bfloat16 product anew for every new shape.
ROWS = 128


class Router(nn.Module):
    """Which experts a token goes to."""

    def __init__(self, width: int, num_experts: int, num_used: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.num_used = num_used

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, experts) in float32: rounding to bfloat16 would choose other experts than llama.cpp."""
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), self.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Probabilities (tokens, experts), shares and ids of the chosen experts (tokens, used)."""
        probabilities = self.logits(x).softmax(-1)
        shares, chosen = probabilities.topk(self.num_used)
        return probabilities, shares / shares.sum(-1, keepdim=True), chosen


def balance_loss(probabilities: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """1 when the experts are used evenly, else more (Switch Transformer, arXiv:2101.03961, equation 4)."""
    num_experts = probabilities.shape[-1]
    use = torch.bincount(chosen.flatten(), minlength=num_experts) / chosen.numel()
    return num_experts * (use * probabilities.mean(0)).sum()


class Reorder(torch.autograd.Function):
    """Rows in another order; its backward reads instead of adding, twenty times faster on a CPU."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.back = back
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.index_select(0, ctx.back), None, None


class Experts(nn.Module):
    """Every token is computed by the few experts that its router chooses.

    After a forward pass in training `balance` holds the balance loss of that pass.
    """

    def __init__(self, experts: list[nn.Module], width: int, num_used: int):
        super().__init__()
        self.router = Router(width, len(experts), num_used)
        self.experts = nn.ModuleList(experts)
        self.balance: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        probabilities, shares, chosen = self.router(rows)
        if self.training:
            self.balance = balance_loss(probabilities, chosen)
        return self.mix(rows, shares, chosen).view_as(x)

    @torch.compiler.disable
    def mix(self, rows: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert, the experts, and back to the tokens' order: (tokens, width)."""
        num_used = chosen.shape[1]
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        order = chosen.flatten().argsort()
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        if torch.is_autocast_enabled("cpu"):
            rows = rows.to(torch.get_autocast_dtype("cpu"))
        repeated = rows[:, None, :].expand(-1, num_used, -1).flatten(0, 1)
        parts = Reorder.apply(repeated, order, back).split(counts)
        results = torch.cat([
            expert(F.pad(part, (0, 0, 0, -len(part) % ROWS)))[:len(part)]
            for expert, part in zip(self.experts, parts)])
        results = Reorder.apply(results, back, order).unflatten(0, (-1, num_used))
        return (results.float() * shares[..., None]).sum(1)
