"""Configurations by name: our own sizes, and those of published models.

A published one has the values of the config.json in the Hugging Face repository that stands above it; coefficients
that matter in training alone, and that are not in the file, are those of the paper, or 0. What `MixtralModel` cannot
build (`ModelConfig.unsupported`) is there for `minimoe.cost`.
"""

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
    # mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x7b": ModelConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=32_768, rope_theta=1e6, rms_norm_eps=1e-5, tie_word_embeddings=False,
        router_aux_loss_coef=0.02, router_z_loss_coef=0.0,
    ),
    # mistralai/Mixtral-8x22B-v0.1
    "mixtral-8x22b": ModelConfig(
        vocab_size=32_000, hidden_size=6144, intermediate_size=16_384, num_hidden_layers=56,
        num_attention_heads=48, num_key_value_heads=8, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=65_536, rope_theta=1e6, rms_norm_eps=1e-5, tie_word_embeddings=False,
        router_aux_loss_coef=0.001, router_z_loss_coef=0.0,
    ),
    # allenai/OLMoE-1B-7B-0924
    "olmoe-1b-7b": ModelConfig(
        vocab_size=50_304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=16, qk_norm="full", num_experts=64, num_experts_per_tok=8,
        norm_topk_prob=False, max_position_embeddings=4096, rope_theta=1e4, rms_norm_eps=1e-5,
        tie_word_embeddings=False, router_aux_loss_coef=0.01, router_z_loss_coef=0.001,
    ),
    # Qwen/Qwen1.5-MoE-A2.7B
    "qwen1.5-moe-a2.7b": ModelConfig(
        vocab_size=151_936, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=16, attention_bias=True, num_experts=60, num_experts_per_tok=4,
        moe_intermediate_size=1408, norm_topk_prob=False, n_shared_experts=1, shared_expert_intermediate_size=5632,
        shared_expert_gate=True, max_position_embeddings=8192, rope_theta=1e6, rms_norm_eps=1e-6,
        tie_word_embeddings=False, router_aux_loss_coef=0.001, router_z_loss_coef=0.0,
    ),
    # Qwen/Qwen3-30B-A3B
    "qwen3-30b-a3b": ModelConfig(
        vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, qk_norm="head", num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, max_position_embeddings=40_960, rope_theta=1e6,
        rms_norm_eps=1e-6, tie_word_embeddings=False, router_aux_loss_coef=0.001, router_z_loss_coef=0.0,
    ),
    # deepseek-ai/DeepSeek-V3, without its module that predicts the token after next; losses and bias: section 4.2
    "deepseek-v3": ModelConfig(
        vocab_size=129_280, hidden_size=7168, intermediate_size=18_432, num_hidden_layers=61,
        mlp_only_layers=(0, 1, 2), num_attention_heads=128, num_key_value_heads=128, attention_type="mla",
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        num_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, n_shared_experts=1,
        router_type="sigmoid", n_group=8, topk_group=4, routed_scaling_factor=2.5,
        max_position_embeddings=163_840, rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=False,
        router_aux_loss_type="sequence", router_aux_loss_coef=0.0001, router_z_loss_coef=0.0,
        router_bias_update_rate=0.001,
    ),
    # openai/gpt-oss-20b
    "gpt-oss-20b": ModelConfig(
        vocab_size=201_088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64, attention_bias=True, attention_output_bias=True,
        attention_sinks=True, sliding_window=128, layer_types=("sliding_attention", "full_attention") * 12,
        num_experts=32, num_experts_per_tok=4, router_bias=True, mlp_bias=True, max_position_embeddings=131_072,
        rope_theta=150_000.0, rms_norm_eps=1e-5, tie_word_embeddings=False,
        router_aux_loss_coef=0.9, router_z_loss_coef=0.0,
    ),
    # meta-llama/Llama-2-7b-hf: dense
    "llama-2-7b": ModelConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
        mlp_only_layers=tuple(range(32)), num_attention_heads=32, num_key_value_heads=32,
        max_position_embeddings=4096, rope_theta=1e4, rms_norm_eps=1e-5, tie_word_embeddings=False,
    ),
    # meta-llama/Llama-2-70b-hf: dense
    "llama-2-70b": ModelConfig(
        vocab_size=32_000, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        mlp_only_layers=tuple(range(80)), num_attention_heads=64, num_key_value_heads=8,
        max_position_embeddings=4096, rope_theta=1e4, rms_norm_eps=1e-5, tie_word_embeddings=False,
    ),
}  # fmt: skip
