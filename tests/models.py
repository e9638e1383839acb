"""Tiny real models of transformers, seeded: one for every way in which a checkpoint may name its tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmerge.adapter.naming.slots import Slot

# No two sizes are equal where a class allows it, so that a swapped dimension shows.
TEXT: dict[str, Any] = {
    "vocab_size": 56,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
WIDE: dict[str, Any] = {**TEXT, "head_dim": 12}
MOE: dict[str, Any] = {**WIDE, "moe_intermediate_size": 20, "num_experts": 3, "num_experts_per_tok": 2}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
CLIP: dict[str, Any] = {**VISION, "projection_dim": 18, "model_type": "clip_vision_model"}
SIGLIP: dict[str, Any] = {**VISION, "model_type": "siglip_vision_model"}
MROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 2, 3], "rope_theta": 10000.0}
LLAMA_TEXT: dict[str, Any] = {**WIDE, "model_type": "llama"}


def build(name: str) -> Any:
    """The model `name`, one of NAMES, in float32; the same values at every call, no two tensors alike."""
    torch.manual_seed(0)
    model = _BUILDERS[name]().eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape) * 0.02)  # biases begin as zeros, norms as ones
    return model


def save(name: str, folder: Path, *, original: bool = True) -> Path:
    """The model `name` as transformers saves it: with the names of old checkpoints, or with `original=False` with those
    of its modules, experts fused."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    build(name).save_pretrained(folder, save_original_format=original)
    return folder


def cut(parameter: Tensor, slot: Slot) -> Tensor:
    """The tensor that `slot` says is a part of `parameter`."""
    box = parameter
    for dim, (start, length) in enumerate(zip(slot.starts, slot.sizes, strict=True)):
        box = box.narrow(dim, start, length)
    thin = [dim for dim in range(box.dim()) if dim not in slot.order]
    return box.permute(*slot.order, *thin).reshape(slot.shape)


def _llama() -> Any:
    import transformers as t

    return t.LlamaForCausalLM(t.LlamaConfig(**WIDE))


def _llama_tied() -> Any:
    import transformers as t

    return t.LlamaForCausalLM(t.LlamaConfig(**{**WIDE, "tie_word_embeddings": True}))


def _gpt2() -> Any:
    import transformers as t

    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=56, n_embd=32, n_inner=44, n_layer=2, n_head=4, n_positions=24))


def _mixtral() -> Any:
    import transformers as t

    sizes = {**WIDE, "intermediate_size": 20}
    return t.MixtralForCausalLM(t.MixtralConfig(**sizes, num_local_experts=3, num_experts_per_tok=2))


def _phimoe() -> Any:
    import transformers as t

    sizes = {**TEXT, "intermediate_size": 20}
    return t.PhimoeForCausalLM(t.PhimoeConfig(**sizes, num_local_experts=3, num_experts_per_tok=2))


def _qwen2_moe() -> Any:
    import transformers as t

    return t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=36))


def _qwen3_moe() -> Any:
    import transformers as t

    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**MOE))


def _deepseek_v3() -> Any:
    import transformers as t

    config = t.DeepseekV3Config(
        **{**TEXT, "num_key_value_heads": 4, "num_hidden_layers": 3},
        moe_intermediate_size=20,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=10,
        q_lora_rank=14,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
    )
    return t.DeepseekV3ForCausalLM(config)


def _gpt_oss() -> Any:
    import transformers as t

    sizes = {**WIDE, "intermediate_size": 20}
    return t.GptOssForCausalLM(t.GptOssConfig(**sizes, num_local_experts=3, num_experts_per_tok=2))


def _llama4_sizes() -> dict[str, Any]:
    return {
        **WIDE,
        "intermediate_size": 20,
        "intermediate_size_mlp": 44,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "pad_token_id": 0,
    }


def _llama4_text() -> Any:
    import transformers as t

    return t.Llama4ForCausalLM(t.Llama4TextConfig(**_llama4_sizes()))


def _llama4() -> Any:
    import transformers as t

    vision = {**VISION, "intermediate_size": 64, "patch_size": 4, "vision_output_dim": 36}
    vision |= {"projector_input_dim": 36, "projector_output_dim": 36}
    return t.Llama4ForConditionalGeneration(
        t.Llama4Config(text_config=_llama4_sizes(), vision_config=vision, pad_token_id=0)
    )


def _llava() -> Any:
    import transformers as t

    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(vision_config=CLIP, text_config=LLAMA_TEXT, image_token_index=5, tie_word_embeddings=False)
    )


def _llava_next() -> Any:
    import transformers as t

    config = t.LlavaNextConfig(
        vision_config=CLIP,
        text_config=LLAMA_TEXT,
        image_token_index=5,
        image_grid_pinpoints=[[16, 16]],
        tie_word_embeddings=False,
    )
    return t.LlavaNextForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    import transformers as t

    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 3, "patch_size": 4}
    text = {**TEXT, "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]}}
    return t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    )


def _qwen2_5_vl() -> Any:
    import transformers as t

    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 28, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [1]}
    text = {**TEXT, "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]}}
    return t.Qwen2_5_VLForConditionalGeneration(
        t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    )


def _qwen3_vl_vision() -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 28,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0],
    }


def _qwen3_vl() -> Any:
    import transformers as t

    text = {**WIDE, "rope_parameters": MROPE}
    config = t.Qwen3VLConfig(text_config=text, vision_config=_qwen3_vl_vision(), tie_word_embeddings=False)
    return t.Qwen3VLForConditionalGeneration(config)


def _qwen3_vl_moe() -> Any:
    import transformers as t

    text = {**MOE, "rope_parameters": MROPE, "pad_token_id": 0}
    config = t.Qwen3VLMoeConfig(text_config=text, vision_config=_qwen3_vl_vision(), tie_word_embeddings=False)
    return t.Qwen3VLMoeForConditionalGeneration(config)


def _gemma3() -> Any:
    import transformers as t

    config = t.Gemma3Config(text_config=WIDE, vision_config=SIGLIP, mm_tokens_per_image=4, tie_word_embeddings=False)
    return t.Gemma3ForConditionalGeneration(config)


def _paligemma() -> Any:
    import transformers as t

    text = {**WIDE, "model_type": "gemma"}
    config = t.PaliGemmaConfig(
        text_config=text, vision_config=SIGLIP, projection_dim=32, image_token_index=5, tie_word_embeddings=False
    )
    return t.PaliGemmaForConditionalGeneration(config)


def _mistral3() -> Any:
    import transformers as t

    config = t.Mistral3Config(
        text_config={**WIDE, "model_type": "mistral"},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 8},
        image_token_index=5,
        tie_word_embeddings=False,
    )
    return t.Mistral3ForConditionalGeneration(config)


def _mllama() -> Any:
    import transformers as t

    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 28,
        "vision_output_dim": 32,
        "image_size": 16,
        "patch_size": 8,
        "intermediate_layers_indices": [1],
    }
    text = {**TEXT, "cross_attention_layers": [1], "pad_token_id": 0}
    return t.MllamaForConditionalGeneration(t.MllamaConfig(vision_config=vision, text_config=text))


_BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama_tied": _llama_tied,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
    "phimoe": _phimoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "llama4_text": _llama4_text,
    "llama4": _llama4,
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "mistral3": _mistral3,
    "mllama": _mllama,
}
NAMES = tuple(_BUILDERS)
