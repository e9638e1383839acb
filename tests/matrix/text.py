"""LoRA in all its variants on text models: Llama, tied embeddings, GPT-2's Conv1D, bare backbones, convolutions."""

from __future__ import annotations

from tests.matrix.case import ALL, ATTENTION, HEAD, Case, experts, lora
from tests.matrix.zoo import CLASSES

_BLOCKS = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2, "match_strict": False}
_EMBEDDING = ("embed_tokens", "q_proj")
_DENSE_HEAD = tuple(f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("bias", "weight"))
_KERNELS = ("line", "plane", "point", "solid")

LLAMA = [
    lora("llama", "LoRA", targets=ALL, shard="20KB"),
    lora("llama", "LoRA", targets=ALL, dtype="bfloat16"),
    lora("llama", "LoRA", targets=ALL, dtype="float16", shard="9KB"),
    lora("llama", "rsLoRA, patterns", use_rslora=True, rank_pattern={"v_proj": 7}, alpha_pattern={"q_proj": 2}),
    lora("llama", "DoRA", targets=ALL, use_dora=True),
    lora("llama", "DoRA", targets=ALL, use_dora=True, dtype="bfloat16", shard="9KB"),
    lora("llama", "DoRA on the embedding", targets=_EMBEDDING, use_dora=True, noise=0.1),
    lora("llama", "LoRA on embedding and head", targets=("embed_tokens", "lm_head")),
    lora("llama", "LoRA of a parameter", target_parameters=["q_proj.weight"], targets=("v_proj",)),
    lora("llama", "modules_to_save: embedding, head", modules_to_save=["embed_tokens", "lm_head"]),
    lora("llama", "modules_to_save: norms", modules_to_save=["input_layernorm", "norm"]),
    lora("llama", "token rows", trainable_token_indices=[7, 3, 40]),
    lora("llama", "token rows of both", trainable_token_indices={"embed_tokens": [7, 3, 40], "lm_head": [11, 2]}),
    lora("llama_biased", "LoRA, bias=all", bias="all"),
    lora("llama_biased", "LoRA, bias=lora_only", bias="lora_only", targets=ALL),
    lora("llama_biased", "lora_bias", lora_bias=True, targets=ALL),
    lora("qwen2", "LoRA, bias=all", bias="all", dtype="bfloat16"),
    lora("qwen2", "lora_bias", lora_bias=True),
    lora("llama", "LoRA, vocabulary grown", vocab=60),
    lora("llama", "LoRA, vocabulary shrunk", vocab=50),
    lora("llama", "LoRA on embedding and head, vocabulary grown", vocab=61, targets=("embed_tokens", "lm_head")),
    lora("llama", "LoRA on model.embed_tokens, vocabulary grown", vocab=61, targets=("model.embed_tokens",)),
    lora("llama", "modules_to_save, vocabulary grown", vocab=61, modules_to_save=["embed_tokens", "lm_head"]),
    lora("llama", "token rows, vocabulary grown", vocab=58, trainable_token_indices=[56, 57]),
    lora("llama", "KaSA", kasa_config={"": "KasaConfig"}, tolerance=3e-5),
    lora(
        "llama", "BD-LoRA", r=4, targets=("q_proj", "o_proj", "down_proj"), use_bdlora={"": "BdLoraConfig", **_BLOCKS}
    ),
    lora("llama", "VeLoRA", velora_config={"": "VeloraConfig", "num_groups": 4}),
    lora("llama", "MonteCLoRA", monteclora_config={"": "MontecloraConfig"}),
    lora("llama_deep", "layer_replication", layer_replication=[[0, 2], [1, 3]]),
    lora("llama", "PiSSA", targets=ALL, init_lora_weights="pissa", tolerance=3e-5, noise=0.05),
    lora("llama", "OLoRA", targets=ALL, init_lora_weights="olora", tolerance=3e-5, noise=0.05),
    lora("llama", "orthogonal start", init_lora_weights="orthogonal", r=4),
    lora("llama", "MiCA start", init_lora_weights="mica"),
    lora("llama", "one layer, excluded modules", layers_to_transform=[1], exclude_modules=["v_proj"]),
    *(
        lora("llama", f"{start} with its initial adapter", targets=ALL, start=start, noise=0.05, tolerance=3e-5)
        for start in ("corda", "lora_ga", "pissa", "olora")
    ),
]
TIED = [
    lora("llama_tied", "LoRA", targets=ALL, tied=True),
    lora("llama_tied", "LoRA on the embedding", targets=_EMBEDDING, tied=False, new=HEAD),
    lora("llama_tied", "LoRA on the head", targets=("lm_head", "q_proj"), tied=False, new=HEAD, shard="9KB"),
    lora("llama_tied", "LoRA on both", targets=("embed_tokens", "lm_head"), tied=False, new=HEAD),
    lora(
        "llama_tied",
        "LoRA on both, ensure_weight_tying",
        targets=("embed_tokens", "lm_head"),
        ensure_weight_tying=True,
        tied=True,
    ),
    lora("llama_tied", "DoRA on the embedding", targets=_EMBEDDING, use_dora=True, noise=0.1, tied=False, new=HEAD),
    lora("llama_tied", "modules_to_save: head", modules_to_save=["lm_head"], tied=False, new=HEAD),
    lora("llama_tied", "modules_to_save: embedding", modules_to_save=["embed_tokens"], tied=False, new=HEAD),
    lora("llama_tied", "modules_to_save: both", modules_to_save=["embed_tokens", "lm_head"], tied=False, new=HEAD),
    lora(
        "llama_tied",
        "modules_to_save: embedding, ensure_weight_tying",
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
        tied=True,
    ),
    lora("llama_tied", "token rows", trainable_token_indices=[7, 3, 40], tied=True),
    lora("llama_tied", "token rows", trainable_token_indices={"embed_tokens": [7, 3]}, tied=True, dtype="bfloat16"),
    lora("llama_tied", "LoRA, vocabulary grown", vocab=60, tied=True),
    lora("llama_tied", "LoRA, vocabulary shrunk", vocab=50, tied=True),
    lora("llama_tied", "token rows, vocabulary grown", vocab=58, trainable_token_indices=[56, 57], tied=True),
    lora("llama_tied", "LoRA on the embedding, vocabulary grown", vocab=60, targets=_EMBEDDING, tied=False, new=HEAD),
    lora("gemma", "LoRA on the embedding", targets=("embed_tokens",), tied=False, new=HEAD),
]
GPT2 = [
    lora("gpt2", "LoRA", targets=ALL, tied=True),
    lora("gpt2", "LoRA, fan_in_fan_out", targets=("c_attn",), fan_in_fan_out=True, tied=True, dtype="bfloat16"),
    lora("gpt2", "DoRA", targets=("c_attn", "c_proj"), use_dora=True, naming="modules", tied=True),
    lora("gpt2", "LoRA on the embeddings", targets=("wte", "wpe"), tied=False, new=HEAD),
    lora("gpt2", "LoRA, bias=all", targets=("c_attn",), bias="all", tied=True),
    lora("gpt2", "token rows", targets=("c_fc",), trainable_token_indices={"wte": [7, 3]}, tied=True),
    lora("gpt2", "modules_to_save: head", targets=("c_fc",), modules_to_save=["lm_head"], tied=False, new=HEAD),
    lora("gpt2", "PiSSA", targets=("c_attn",), init_lora_weights="pissa", noise=0.05, tolerance=3e-5, tied=True),
]
OTHER_CLASSES = [
    lora("llama", "LoRA of the bare backbone", trained_as="LlamaModel", targets=ALL, task_type="FEATURE_EXTRACTION"),
    lora("llama_backbone", "LoRA of the causal model", trained_as="LlamaForCausalLM", targets=ALL),
    lora("gpt2", "LoRA of the bare backbone", trained_as="GPT2Model", targets=("c_attn", "c_fc"), task_type=None),
    experts("mixtral", "LoRA of the bare backbone", trained_as="MixtralModel", task_type=None),
    lora("llava", "LoRA of the bare backbone", trained_as="LlavaModel", task_type=None),
    lora(
        "llama",
        "SEQ_CLS with a new head",
        trained_as="LlamaForSequenceClassification",
        task_type="SEQ_CLS",
        new=("score.weight",),
    ),
    lora(
        "llama_tied",
        "TOKEN_CLS with a new head",
        trained_as="LlamaForTokenClassification",
        task_type="TOKEN_CLS",
        new=("score.bias", "score.weight"),
    ),
]
NET = [
    lora("net", "LoRA on convolutions, attention", targets=(*_KERNELS, "mha"), task_type=None),
    lora("net", "DoRA on convolutions, embedding", targets=(*_KERNELS, "embed"), use_dora=True, task_type=None),
    lora("net", "LoRA, bias=all", targets=(*_KERNELS, "out"), bias="all", task_type=None),
]
SEVERAL = [
    lora(
        "llama",
        "two LoRAs",
        targets=ALL,
        more=({"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"]},),
        weights=(1.0, 1.0),
    ),
    lora(
        "llama",
        "two LoRAs, weighted",
        dtype="bfloat16",
        more=({"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"]},),
        weights=(0.7, -0.4),
    ),
    lora(
        "gpt2",
        "three LoRAs, weighted",
        targets=("c_attn",),
        more=(
            {"r": 2, "lora_alpha": 7, "target_modules": ["c_attn", "c_fc"], "use_rslora": True},
            {"r": 4, "lora_alpha": 3, "target_modules": ["c_attn"]},
        ),
        weights=(0.7, -0.4, 1.5),
        tied=True,
    ),
    lora(
        "llama",
        "two DoRAs",
        use_dora=True,
        more=({"r": 2, "lora_alpha": 7, "target_modules": list(ATTENTION), "use_dora": True},),
        weights=(1.0, 1.0),
    ),
    lora(
        "llama",
        "DoRA, then LoRA",
        use_dora=True,
        more=({"r": 2, "lora_alpha": 7, "target_modules": ["q_proj"]},),
        weights=(1.0, 1.0),
    ),
    lora(
        "llama_tied",
        "two LoRAs, one on the head",
        more=({"r": 2, "lora_alpha": 7, "target_modules": ["lm_head"]},),
        weights=(1.0, 1.0),
        tied=False,
        new=HEAD,
    ),
]
_ENSURED = {"ensure_weight_tying": True, "tied": True}
_APART = {"tied": False, "new": HEAD}
_BOTH = ("embed_tokens", "lm_head")
TIED_TOO = [
    lora("llama_tied", "modules_to_save: both, vocabulary grown", vocab=60, modules_to_save=[*_BOTH], **_APART),
    lora("llama_tied", "modules_to_save: head, vocabulary grown", vocab=60, modules_to_save=["lm_head"], **_APART),
    lora("llama_tied", "modules_to_save: head, ensure_weight_tying", modules_to_save=["lm_head"], **_ENSURED),
    lora("llama_tied", "LoRA on both, vocabulary grown", vocab=60, targets=_BOTH, **_APART),
    lora("llama_tied", "LoRA on both, ensured, vocabulary grown", vocab=60, targets=_BOTH, **_ENSURED),
    lora("llama_tied", "LoRA on the head, vocabulary grown", vocab=60, targets=("lm_head", "q_proj"), **_APART),
    lora("llama_tied", "LoRA on one side, ensured", targets=("lm_head", "q_proj"), **_ENSURED),
    lora("llama_tied", "LoRA on both, two ranks", targets=_BOTH, rank_pattern={"lm_head": 5}, **_APART),
    lora("llama_tied", "DoRA on the head", targets=("lm_head", "q_proj"), use_dora=True, noise=0.1, **_APART),
    lora(
        "llama_tied",
        "LoRA on one side, the other saved",
        targets=("lm_head",),
        modules_to_save=["embed_tokens"],
        **_APART,
    ),
    lora("llama_tied", "token rows of the head", trainable_token_indices={"lm_head": [5, 1]}, **_APART),
    lora(
        "llama_tied", "the same token rows of both", trainable_token_indices={name: [5, 1] for name in _BOTH}, tied=True
    ),
    lora("gpt2", "LoRA, vocabulary grown", targets=ALL, vocab=60, tied=True),
    lora("gpt2", "LoRA on the embedding, vocabulary grown", targets=("wte", "c_attn"), vocab=60, **_APART),
    lora("gpt2", "modules_to_save: embedding", targets=("c_attn",), modules_to_save=["wte"], **_APART),
]
TOGETHER = [
    lora("llama_biased", "DoRA, bias=all", use_dora=True, bias="all"),
    lora("llama", "KaSA, rsLoRA", kasa_config={"": "KasaConfig"}, use_rslora=True, tolerance=3e-5),
    lora(
        "llama",
        "BD-LoRA, rsLoRA",
        r=4,
        targets=("q_proj", "o_proj"),
        use_rslora=True,
        use_bdlora={"": "BdLoraConfig", **_BLOCKS},
    ),
    lora(
        "llama",
        "PiSSA, rsLoRA, patterns",
        init_lora_weights="pissa",
        use_rslora=True,
        rank_pattern={"v_proj": 5},
        noise=0.05,
        tolerance=3e-5,
    ),
    lora("llama_deep", "layer_replication, DoRA", layer_replication=[[0, 2], [1, 3]], use_dora=True, targets=ALL),
    lora(
        "llama_deep",
        "layer_replication, modules_to_save",
        layer_replication=[[0, 1], [0, 3]],
        modules_to_save=["input_layernorm"],
    ),
    lora("llama", "modules_to_save: a layer's MLP", modules_to_save=["layers.1.mlp"]),
]
ZOO = [
    *(lora(name, "LoRA", targets=ALL, task_type=None) for name in CLASSES),
    *(
        lora(name, "DoRA, bias=all", targets=ALL, use_dora=True, bias="all")
        for name in ("opt", "gpt_neox", "bloom", "phi3")
    ),
    lora("opt", "LoRA on the embedding", targets=("model.decoder.embed_tokens",), **_APART),
    lora("bloom", "LoRA on the embedding", targets=("word_embeddings",), **_APART),
    lora("gpt_neox", "LoRA on the embedding", targets=("embed_in",)),
    lora("t5", "token rows", targets=("q", "v"), trainable_token_indices=[7, 3], task_type=None, tied=True),
    lora("t5", "LoRA, vocabulary grown", targets=("q", "v"), vocab=60, task_type=None, tied=True),
    lora("bart", "token rows", trainable_token_indices=[7, 3], task_type=None, tied=True),
    lora("olmoe", "LoRA, token rows", targets=ALL, trainable_token_indices=[7, 3]),
    lora(
        "roberta",
        "SEQ_CLS with a new head",
        trained_as="RobertaForSequenceClassification",
        task_type="SEQ_CLS",
        targets=("query",),
        new=_DENSE_HEAD,
    ),
    lora(
        "bert",
        "TOKEN_CLS with a new head",
        trained_as="BertForTokenClassification",
        task_type="TOKEN_CLS",
        targets=("query",),
        new=("classifier.bias", "classifier.weight"),
    ),
]
CASES: list[Case] = [*LLAMA, *TIED, *GPT2, *OTHER_CLASSES, *NET, *SEVERAL, *TIED_TOO, *TOGETHER, *ZOO]
