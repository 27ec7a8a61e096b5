"""Settings of published checkpoints, beyond those that transformers' config classes begin with.

A config class begins with the settings of the checkpoint that its docstring names (Qwen2-7B,
OLMo-7B, phi-1, ...), so each family is tested with those; here is what other checkpoints of it
publish in their config.json and a class does not begin with. Sizes are left out.
"""

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1_000_000,
    "factor": 16.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}

# A family, a checkpoint on the Hub, and its settings.
PUBLISHED = [
    (
        "ministral3",
        "mistralai/Devstral-Small-2-24B-Instruct-2512",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100_000_000.0,
                "factor": 48.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 8192,
                "llama_4_scaling_beta": 0.1,
            }
        },
    ),
    (
        "glm4",
        "zai-org/GLM-4-9B-0414",
        {
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
            },
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
    (
        "exaone4",
        "LGAI-EXAONE/EXAONE-4.0-32B",
        {
            "rope_parameters": LLAMA_3_ROPE,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "tie_word_embeddings": False,
        },
    ),
    (
        "cohere2",
        "CohereLabs/tiny-aya-base",
        {"logit_scale": 1.0, "attention_bias": False, "tie_word_embeddings": True},
    ),
    (
        "gpt_neox",
        "togethercomputer/RedPajama-INCITE-Instruct-3B-v1",
        {
            "use_parallel_residual": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    (
        "falcon",
        "tiiuae/falcon-40b",
        {
            "new_decoder_architecture": True,
            "parallel_attn": True,
            "bias": False,
            "num_kv_heads": 2,
        },
    ),
    (
        "falcon",
        "tiiuae/falcon-rw-1b",
        {
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "new_decoder_architecture": False,
            "parallel_attn": False,
        },
    ),
    (
        "gpt_oss",
        "openai/gpt-oss-20b",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150_000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "attention_bias": True,
            "swiglu_limit": 7.0,
        },
    ),
    (
        "glm4_moe",
        "zai-org/GLM-4.5",
        {
            "attention_bias": True,
            "use_qk_norm": True,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    (
        "phimoe",
        "microsoft/Phi-3.5-MoE-instruct",
        {
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.01,
            "input_jitter_noise": 0.01,
        },
    ),
    (
        "dots1",
        "rednote-hilab/dots.llm1.inst",
        {
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0},
        },
    ),
]
