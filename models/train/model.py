"""The network: llama architecture with tied embeddings, dense or with experts, in PyTorch.

RoPE turns neighbouring pairs (2i, 2i+1), as llama.cpp's `llama` architecture does, so the query and key
matrices are exported without a permutation. Matrices are stored (out, in), as GGUF expects.
"""
from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional as F

from experts import Experts


@dataclass(frozen=True)
class Config:
    """Shape of the model; every length is in numbers, not bytes."""

    vocab_size: int = 4096
    embedding_length: int = 256
    num_layers: int = 7
    num_heads: int = 8
    num_kv_heads: int = 4
    ffn_length: int = 768  # of one expert, where there are experts
    context_length: int = 512
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5
    num_experts: int = 0  # 0: a dense model
    num_experts_used: int = 0

    @property
    def head_length(self) -> int:
        return self.embedding_length // self.num_heads

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


CONFIGS = {
    "story": Config(),
    "story-moe": Config(num_layers=8, ffn_length=64, num_experts=16, num_experts_used=2),
}
# Of the layers' balance losses: enough that no expert dies, little enough that experts specialise.
BALANCE_WEIGHT = 0.01


def rotation(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position and pair, each (context, head_length / 2)."""
    half = torch.arange(0, config.head_length, 2, dtype=torch.float64) / config.head_length
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float64), config.rope_base ** -half)
    return angles.cos().float(), angles.sin().float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of `x` (batch, tokens, heads, head_length)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with fewer key-value heads than query heads."""

    def __init__(self, config: Config):
        super().__init__()
        width, kv_width = config.embedding_length, config.num_kv_heads * config.head_length
        self.config = config
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_width, bias=False)
        self.v = nn.Linear(width, kv_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = (-1, self.config.head_length)
        q = rotate(self.q(x).unflatten(-1, heads), cos, sin).transpose(1, 2)
        k = rotate(self.k(x).unflatten(-1, heads), cos, sin).transpose(1, 2)
        v = self.v(x).unflatten(-1, heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Linear(config.embedding_length, config.ffn_length, bias=False)
        self.up = nn.Linear(config.embedding_length, config.ffn_length, bias=False)
        self.down = nn.Linear(config.ffn_length, config.embedding_length, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and with its own dropout on the way back."""

    def __init__(self, config: Config, dropout: float):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.embedding_length, eps=config.norm_epsilon)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.embedding_length, eps=config.norm_epsilon)
        if config.num_experts:
            experts = [FeedForward(config) for _ in range(config.num_experts)]
            self.ffn = Experts(experts, config.embedding_length, config.num_experts_used)
        else:
            self.ffn = FeedForward(config)
        self.dropout = dropout

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + F.dropout(self.attention(self.attention_norm(x), cos, sin), self.dropout, self.training)
        return x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training)


class Model(nn.Module):
    """Token ids (batch, tokens) to logits (batch, tokens, vocab)."""

    def __init__(self, config: Config, dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_length)
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.embedding_length, eps=config.norm_epsilon)
        cos, sin = rotation(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        residual_std = 0.02 / (2 * self.config.num_layers) ** 0.5  # as GPT-2
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and not name.startswith("embedding"):
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=residual_std if into_residual else 0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tokens = ids.shape[1]
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, self.cos[:tokens], self.sin[:tokens])
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy, in nats a token; with experts in training, plus the weighted balance loss."""
        logits = self(ids)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        if self.training and self.config.num_experts:
            loss = loss + BALANCE_WEIGHT * sum(layer.ffn.balance for layer in self.layers)
        return loss

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
