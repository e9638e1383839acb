"""PEFT's other tuners: on Llama with their formulas written out, on GPT-2's Conv1D, on models of several parts."""

from __future__ import annotations

from typing import Any

from tests.matrix.case import Case, tuned

_LLAMA: list[tuple[str, str, dict[str, Any]]] = [
    ("LoHa", "", {"r": 4, "alpha": 6, "noise": 0.5}),
    ("LoKr", "", {"r": 4, "alpha": 6}),
    (
        "LoKr",
        "LoKr, decomposed twice",
        {"r": 2, "alpha": 6, "decompose_both": True, "decompose_factor": 4, "noise": 0.5},
    ),
    ("AdaLora", "", {"init_r": 6, "target_r": 4, "lora_alpha": 5, "total_step": 10, "noise": 0.4}),
    ("Vera", "", {"r": 8}),
    ("IA3", "", {"feedforward_modules": ["down_proj"]}),
    ("OFT", "", {"oft_block_size": 4, "noise": 0.05}),
    ("OFT", "OFT, exact Cayley", {"oft_block_size": 4, "use_cayley_neumann": False}),
    ("BOFT", "", {"boft_block_size": 4}),
    ("HRA", "", {"r": 4}),
    ("Miss", "", {"r": 4, "noise": 0.05}),
]
# Those that PEFT has for Conv1D, with their formulas where they are written out.
_GPT2: list[tuple[str, dict[str, Any]]] = [
    ("IA3", {"feedforward_modules": ["c_fc"]}),
    ("Vera", {"r": 8}),
    ("AdaLora", {"init_r": 6, "target_r": 4, "lora_alpha": 5, "total_step": 10, "noise": 0.4}),
    ("FourierFT", {"n_frequency": 60, "scaling": 130.0, "oracle": False}),
    ("VBLoRA", {"vector_length": 4, "num_vectors": 16, "topk": 2, "r": 4, "oracle": False}),
    ("RandLora", {"r": 5, "randlora_alpha": 3, "oracle": False}),
    ("Hira", {"r": 4, "oracle": False}),
    ("WaveFT", {"n_frequency": 60, "oracle": False}),
    ("Gralora", {"r": 4, "alpha": 6, "oracle": False}),
    ("UniLora", {"r": 4, "theta_d_length": 50, "save_indices": True, "oracle": False}),
    ("Deft", {"r": 4, "alpha": 6, "oracle": False}),
    ("Pvera", {"r": 8, "oracle": False}),
]
CASES: list[Case] = [
    *(
        tuned("llama", tuner, kind, targets=("q_proj", "k_proj", "down_proj"), **fields)
        for tuner, kind, fields in _LLAMA
    ),
    tuned("llama", "LNTuning", targets=("input_layernorm", "norm")),
    tuned("llama", "TrainableTokens", targets=("embed_tokens",), token_indices=[10, 3, 31]),
    tuned("llama_tied", "TrainableTokens", targets=("embed_tokens",), token_indices=[10, 3, 31], tied=True),
    tuned("llama", "LoHa", r=4, alpha=6, noise=0.5, dtype="bfloat16"),
    tuned("llama", "LoHa", "LoHa, modules_to_save: head", r=4, alpha=6, noise=0.5, modules_to_save=["lm_head"]),
    *(tuned("gpt2", tuner, targets=("c_attn", "c_fc"), tied=True, **fields) for tuner, fields in _GPT2),
    tuned("gpt2", "LNTuning", targets=("ln_1", "ln_f"), tied=True),
    tuned("llava", "LoHa", r=4, alpha=6, noise=0.5, naming="clip", targets=("q_proj",)),
    tuned("gemma3", "OFT", oft_block_size=4, noise=0.05, targets=("q_proj", "fc1")),
    tuned("mixtral", "IA3", targets=("q_proj", "v_proj"), feedforward_modules=[]),
    tuned("qwen2", "IA3", targets=("q_proj", "v_proj"), feedforward_modules=[]),
]
