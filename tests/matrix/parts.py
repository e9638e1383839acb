"""Models of several parts: experts fused or one by one, vision towers and projectors, names of older releases."""

from __future__ import annotations

from tests.matrix.case import ALL, EXPERTS, Case, experts, lora, old

_FUSED = ("mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text")
_SEEING = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "gemma3", "paligemma", "mistral3", "mllama")
_MLP = ("gate_proj", "up_proj", "down_proj")

MOE = [
    *(experts(model, naming=naming) for model in _FUSED for naming in ("hub", "modules")),
    experts("mixtral", naming="mixed"),
    experts("qwen3_moe", naming="mixed", dtype="bfloat16", shard="20KB"),
    experts("qwen3_vl_moe"),
    experts("qwen3_vl_moe", naming="transposed"),
    experts("qwen3_moe", "LoRA on one parameter of the experts", parameters=("mlp.experts.down_proj",)),
    experts(
        "mixtral",
        "LoRA on experts alone, rsLoRA, patterns",
        targets=(),
        use_rslora=True,
        rank_pattern={".*gate_up_proj": 4},
        alpha_pattern={".*down_proj": 9},
    ),
    experts("gpt_oss", "LoRA on experts and biases", parameters=("gate_up_proj", "gate_up_proj_bias", "down_proj")),
    experts("mixtral_square", "LoRA on square experts"),
    experts("mixtral_square", "LoRA on square experts", naming="modules"),
    experts("gpt_oss_square", "LoRA on square experts"),
    experts(
        "qwen3_moe",
        "two LoRAs on experts",
        more=({"r": 2, "lora_alpha": 7, "target_modules": [], "target_parameters": list(EXPERTS)},),
        weights=(0.7, 1.5),
    ),
    lora("mixtral", "LoRA", targets=ALL),
    lora("mixtral", "LoRA", targets=ALL, naming="modules"),
    lora("phimoe", "LoRA, bias=all", targets=("q_proj", "o_proj"), bias="all"),
    lora("qwen2_moe", "LoRA", targets=ALL),
    lora("qwen3_moe", "LoRA", targets=ALL, naming="mixed"),
    lora("deepseek_v3", "LoRA", targets=ALL),
    lora("gpt_oss", "LoRA", targets=ALL),
    lora("llama4_text", "LoRA", targets=r".*(_proj|lm_head)"),
    lora("mixtral", "modules_to_save: gate", modules_to_save=["gate"]),
    lora("qwen3_moe", "modules_to_save: experts", modules_to_save=["experts"]),
]
VLM = [
    *(lora(model, "LoRA", naming=naming, targets=ALL) for model in _SEEING for naming in ("hub", "modules")),
    lora("llava", "LoRA", naming="clip", targets=ALL),
    lora("llava_next", "LoRA", naming="clip", targets=ALL, shard="20KB", dtype="bfloat16"),
    lora("gemma3", "LoRA", naming="clip", targets=ALL),
    lora("qwen3_vl", "LoRA", targets=ALL),
    lora("qwen3_vl_moe", "LoRA", targets=ALL),
    lora("llama4", "LoRA", targets=r".*(_proj|fc1|fc2|linear_1)"),
    lora("llava", "modules_to_save: projector", modules_to_save=["multi_modal_projector"]),
    lora("llava", "DoRA on the vision tower", naming="clip", targets=r".*vision_tower.*\.(q_proj|fc1)", use_dora=True),
    lora("llava", "LoRA on embedding and head", targets=("embed_tokens", "lm_head")),
    lora("qwen2_vl", "LoRA on the patch embedding", targets=r".*visual.*(patch_embed\.proj|qkv)"),
    lora("gemma3_tied", "LoRA", targets=ALL, tied=True),
    lora("gemma3_tied", "LoRA, vocabulary grown", vocab=60, tables=True, tied=True),
    lora(
        "gemma3_tied",
        "LoRA on the embedding",
        targets=("embed_tokens",),
        tied=False,
        new=("language_model.lm_head.weight",),
    ),
    lora("qwen2_vl_tied", "LoRA on the head", targets=("lm_head",), tied=False, new=("lm_head.weight",)),
    lora("paligemma_tied", "token rows", naming="modules", trainable_token_indices=[7, 11], tied=True),
]
_SIGHT = ("LoRA", r"q_proj|v_proj|qkv|fc1|lm_head|proj", ("q_proj", "v_proj", "qkv", "fc1", "lm_head"))
_DENSE = ("LoRA on dense, shared and routed experts", r"mlp.*_proj", _MLP)
_MIXTRAL = ("LoRA per expert", r"experts|q_proj", ("w1", "w2", "w3", "q_proj"))
_QWEN3 = ("LoRA per expert", r"experts|q_proj", (*_MLP, "q_proj"))
OLD = [
    old("mixtral", "4", *_MIXTRAL, peft_reads=True),
    old("mixtral", "4", *_MIXTRAL, naming="modules", peft_reads=True),
    old(
        "mixtral", "4", "LoRA per expert", r"experts|gate", ("w1", "w2", "w3", "gate"), naming="mixed", dtype="bfloat16"
    ),
    old("mixtral", "4", "LoRA on some experts", r"experts\.[02]\.w[12]", ("w1", "w2")),
    old("mixtral", "4", "LoRA on some experts", r"experts\.[02]\.w[12]", ("w1", "w2"), naming="modules"),
    old("mixtral_square", "4", *_MIXTRAL, naming="modules"),
    old("phimoe", "4", "LoRA per expert", r"experts|gate$", ("w1", "w2", "w3", "gate"), naming="modules"),
    old("qwen2_moe", "4", "LoRA per expert", r"expert.*_proj", _MLP),
    old("qwen2_moe", "4", "LoRA per expert", r"expert.*_proj", _MLP, naming="modules"),
    old("qwen3_moe", "4", *_QWEN3, peft_reads=True),
    old("qwen3_moe", "4", *_QWEN3, naming="modules", peft_reads=True),
    old("qwen3_moe", "4", "LoRA on one projection", r"experts.*up_proj", ("up_proj",), naming="mixed"),
    old("deepseek_v3", "4", *_DENSE),
    old("deepseek_v3", "4", *_DENSE, naming="modules"),
    *(
        old(model, release, *_SIGHT, naming=naming)
        for model in ("llava", "qwen2_vl", "gemma3", "mllama", "paligemma")
        for release in ("4.51", "4.52")
        for naming in ("hub", "modules")
    ),
    old("llava_next", "4.51", "LoRA", r"q_proj|lm_head|linear", ("q_proj", "lm_head", "linear_1"), naming="clip"),
    old("llava_next", "4.52", "LoRA", r"q_proj|lm_head|linear", ("q_proj", "lm_head", "linear_1"), naming="clip"),
    old("qwen2_5_vl", "4.51", *_SIGHT),
    old("mistral3", "4.52", "LoRA", r"q_proj|lm_head|linear", ("q_proj", "lm_head", "linear_1")),
]
CASES: list[Case] = [*MOE, *VLM, *OLD]
