"""The fields of adapter_config.json that are known for each tuner but LoRA: read, or told by the tensors already."""

from __future__ import annotations

_COMMON = """
    auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode init_weights layers_pattern
    layers_to_transform modules_to_save peft_type peft_version rank_pattern revision runtime_config target_modules
    task_type
"""
_OWN = {
    "ADALORA": """
        alpha_pattern beta1 beta2 corda_config deltaT ensure_weight_tying eva_config init_lora_weights init_r
        loftq_config lora_alpha lora_dropout lora_ga_config megatron_config megatron_core monteclora_config
        orth_reg_weight qalora_group_size r target_r tfinal tinit total_step velora_config
    """,
    "BEFT": "",
    "BOFT": "boft_block_num boft_block_size boft_dropout boft_n_butterfly_factor",
    "BONE": "r",
    "C3A": "block_size block_size_pattern",
    "DEFT": "alpha decomposition_method deft_dropout init_scale para r",
    "DELORA": "delora_lambda lambda_pattern module_dropout r",
    "FOURIERFT": "n_frequency n_frequency_pattern random_loc_seed scaling",
    "GLORA": "config_A_B config_C config_D_E r",
    "GRALORA": "alpha gralora_dropout gralora_k hybrid_r r",
    "HIRA": "hira_dropout r",
    "HRA": "apply_GS r",
    "IA3": "feedforward_modules init_ia3_weights",
    "LN_TUNING": "",
    "LOHA": "alpha alpha_pattern module_dropout r rank_dropout use_effective_conv2d",
    "LOKR": """
        alpha alpha_pattern decompose_both decompose_factor module_dropout r rank_dropout rank_dropout_scale
        use_effective_conv2d
    """,
    "MISS": "mini_r miss_dropout r",
    "OFT": """
        alpha_pattern block_share coft eps module_dropout num_cayley_neumann_terms oft_block_size r use_cayley_neumann
    """,
    "OSF": "effective_rank target_svd_config",
    "PEANUT": "act_fn depth r scaling",
    "PVERA": "d_initial generator_seed projection_prng_key pvera_dropout r sample_at_inference save_projection",
    "RANDLORA": "projection_prng_key r randlora_alpha randlora_dropout save_projection sparse very_sparse",
    "ROAD": "group_size variant",
    "SHIRA": "mask_type r random_seed",
    "SUPERTUNING": "lora_alpha lora_dropout r save_precomputed_indices select_top sparsity",
    "TRAINABLE_TOKENS": "token_indices",
    "UNILORA": "init_theta_d_bound proj_seed r save_indices theta_d_length unilora_dropout",
    "VBLORA": """
        init_logits_std init_vector_bank_bound num_vectors r save_only_topk_weights topk vblora_dropout vector_length
    """,
    "VERA": "d_initial projection_prng_key r save_projection vera_dropout",
    "WAVEFT": """
        n_frequency n_frequency_pattern proportional_parameters random_loc_seed scaling use_idwt wavelet_family
    """,
}
FIELDS: dict[str, frozenset[str]] = {name: frozenset((_COMMON + own).split()) for name, own in _OWN.items()}
