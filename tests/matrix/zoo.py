"""More of transformers' classes, tiny: one that names or ties its parameters in a way of its own each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TEXT: dict[str, Any] = {
    "vocab_size": 56,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
MOE = {**GROUPED, "head_dim": 12, "moe_intermediate_size": 20, "num_experts": 3, "num_experts_per_tok": 2}
GPT = {"vocab_size": 56, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
SEQ2SEQ = {
    "vocab_size": 56,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 44,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 0,
}
_VISION = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
# The class, and what its configuration is made of.
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", TEXT),
    "roberta": ("RobertaForMaskedLM", TEXT),
    "electra": ("ElectraForPreTraining", {**TEXT, "embedding_size": 24}),
    "t5": ("T5ForConditionalGeneration", {**TEXT, "d_model": 32, "d_kv": 8, "d_ff": 44, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", {**SEQ2SEQ, "max_position_embeddings": 24}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            **SEQ2SEQ,
            "max_source_positions": 8,
            "num_mel_bins": 6,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "opt": ("OPTForCausalLM", {**TEXT, "ffn_dim": 44, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 56, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconForCausalLM", TEXT),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 12}),
    "granite_moe": ("GraniteMoeForCausalLM", {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeForCausalLM", {**GROUPED, "num_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_next": ("Qwen3NextForCausalLM", {**MOE, **_LINEAR, "shared_expert_intermediate_size": 36}),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        {
            "text_config": {**GROUPED, "model_type": "qwen2"},
            "vision_config": {**_VISION, "image_size": [16, 16], "patch_size": [8, 8]},
        },
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        {
            "text_config": {**GROUPED, "model_type": "llama"},
            "vision_config": {**_VISION, "image_size": 16, "patch_size": 8},
            "scale_factor": 1,
        },
    ),
}


def maker(kind: str, sizes: dict[str, Any]) -> Callable[[], Any]:
    """Makes a random model of transformers' class `kind`, with `sizes` in its configuration."""

    def make() -> Any:
        import transformers

        own = getattr(transformers, kind)
        return own(own.config_class(**sizes))

    return make
