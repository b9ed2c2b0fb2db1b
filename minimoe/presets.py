"""Configurations by name: our own sizes, and those of published models."""

from __future__ import annotations

from minimoe.config import ModelConfig

PRESETS: dict[str, ModelConfig] = {
    # seconds on one core: for tests and first steps
    "nano": ModelConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_experts=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
    ),
    # about 4M parameters held, 1.6M used per token: the model that ships with the library
    "mini": ModelConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=160, num_hidden_layers=6, num_experts=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.06, router_aux_loss_coef=0.02,
    ),
    # about 50M parameters held: minutes on a GPU
    "small": ModelConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=512, num_hidden_layers=10, num_experts=8,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512,
    ),
}  # fmt: skip
