"""What a forward pass of a model costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a model's body: everything but the embeddings and the output layer.

    Args:
        per_position: of a position, in all linear layers; of experts, those that a token goes through.
        per_pair: of a position that attends to another one.
        branches: rows that the model sees for each row, 2 under guidance.
    """

    per_position: float
    per_pair: float
    branches: int = 1

    def flops(self, positions: int, length: int) -> float:
        """Of so many positions of a row of this length, in all passes together."""
        return positions * (self.per_position + length * self.per_pair)

    @classmethod
    def of(cls, module: nn.Module, config: Any, layers: list[nn.Module | None]) -> Cost | None:
        """That of a transformers model; None if its config does not say enough.

        Args:
            module: the model.
            config: its config.
            layers: the embeddings and the output layer, which do not count.
        """
        num_layers = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layers", None)
        hidden = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
        heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_heads", None)
        if not (num_layers and hidden and heads):
            return None
        left_out = {id(weight) for layer in layers if layer is not None for weight in layer.parameters()}
        left_out |= {
            id(weight) for part in module.modules() if isinstance(part, nn.Embedding) for weight in part.parameters()
        }
        experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
        active = min(getattr(config, "num_experts_per_tok", None) or experts, experts)
        weights = 0.0
        for name, weight in module.named_parameters():
            if weight.ndim >= 2 and id(weight) not in left_out:
                weights += weight.numel() * (active / experts if ".experts." in name else 1.0)
        width = heads * (getattr(config, "head_dim", None) or hidden // heads)
        # A product with a matrix of n numbers is 2 n operations; scores and weighted values are two for each layer.
        return cls(per_position=2 * weights, per_pair=4.0 * width * num_layers)
