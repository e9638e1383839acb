"""Every PEFT tuner but LoRA: the names of its tensors and what they do to a weight, or why it cannot be merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distmerge.adapter.tuners import options as tuner_options
from distmerge.adapter.tuners.checks import Tuned

_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuner:
    """How to find and apply what a tuner saved.

    `operator` is a key of OPERATORS or LOW_RANK in `distmerge.numerics.tuners`; "" says that `tails` replace the
    module's own parameters. A module has all of `tails`, any of `optional`, and nothing else. `shared` tensors are
    saved once, as `base_model.<name>`, for all modules. `read_options` takes the configuration, the module's path, the
    shapes of its and the shared tensors by name, and (out, in) of the weight. With `changes_bias` the operator is
    applied to the bias, seen as (out, 1), too, unless the options say `keeps_bias`; without `changes_weight` to the
    bias alone, which must exist. `formula` gives the new weight.
    """

    peft_type: str
    operator: str
    tails: tuple[str, ...]
    optional: tuple[str, ...]
    shared: tuple[str, ...]
    read_options: Callable[[Mapping[str, Any], str, _Shapes, tuple[int, int]], dict[str, Any]]
    changes_bias: bool
    changes_weight: bool = True
    formula: str
    source: str


def _reader(
    read: Callable[[Tuned], dict[str, Any]],
) -> Callable[[Mapping[str, Any], str, _Shapes, tuple[int, int]], dict[str, Any]]:
    def read_options(config: Mapping[str, Any], module: str, shapes: _Shapes, size: tuple[int, int]) -> dict[str, Any]:
        return read(Tuned(config=config, module=module, shapes=shapes, out=size[0], into=size[1]))

    return read_options


def _tuner(
    peft_type: str,
    operator: str,
    read: Callable[[Tuned], dict[str, Any]],
    *,
    tails: str,
    formula: str,
    optional: str = "",
    shared: str = "",
    source: str = "",
    changes_bias: bool = False,
    changes_weight: bool = True,
) -> Tuner:
    return Tuner(
        peft_type=peft_type,
        operator=operator,
        tails=tuple(tails.split()),
        optional=tuple(optional.split()),
        shared=tuple(shared.split()),
        read_options=_reader(read),
        changes_bias=changes_bias,
        changes_weight=changes_weight,
        formula=formula,
        source=source or f"peft/tuners/{peft_type.lower()}/layer.py",
    )


_LOGITS = "vblora_logits_A vblora_logits_B"
_TOP = "vblora_logits_{0}_topk_indices vblora_logits_{0}_topk_weights"
_PEANUT_LAYERS = " ".join(
    f"peanut_{part}coders.{number}.weight" for part in ("en", "de") for number in range(tuner_options.MAX_DEPTH)
)
_GLORA_PATHS = " ".join(f"glora_{path}.{part}" for path in "ABCDE" for part in ("X", "Xd", "Xu", "zeros"))

_ALL = (
    _tuner(
        "ADALORA",
        "adalora",
        tuner_options.adalora,
        tails="lora_A lora_B lora_E",
        formula="W + lora_alpha / (init_r + 1e-5) * B @ (A * E)",
    ),
    _tuner(
        "BEFT",
        "beft",
        tuner_options.beft,
        tails="beft_bias",
        formula="W; bias + beft_bias",
        changes_bias=True,
        changes_weight=False,
    ),
    _tuner(
        "BOFT",
        "boft",
        tuner_options.boft,
        tails="boft_R boft_s",
        formula="s * W @ (Q_m ... Q_1)', each Q a block-diagonal rotation between butterfly permutations",
    ),
    _tuner(
        "BONE",
        "miss",
        tuner_options.bone,
        tails="bone_block",
        formula="as MISS, which it became in PEFT 0.18",
        source="peft/tuners/bone/layer.py (PEFT 0.17)",
    ),
    _tuner(
        "C3A",
        "c3a",
        tuner_options.c3a,
        tails="c3a_kernel",
        formula="W + C / in, C made of circulant blocks",
    ),
    _tuner(
        "DEFT",
        "deft",
        tuner_options.deft,
        tails="deft_P",
        optional="deft_R",
        formula="W + P @ (s * R - right' @ W0), P and right from a QR or relu of deft_P",
    ),
    _tuner(
        "DELORA",
        "delora",
        tuner_options.delora,
        tails="delora_A delora_B delora_lambda delora_w_norm",
        formula="W + B @ diag(lambda / r / (|A_i| |B_i|)) @ A @ diag(w_norm)",
    ),
    _tuner(
        "FOURIERFT",
        "fourierft",
        tuner_options.fourierft,
        tails="fourierft_spectrum",
        formula="W + scaling * Re(ifft2(spectrum at places drawn from random_loc_seed))",
    ),
    _tuner(
        "GLORA",
        "glora",
        tuner_options.glora,
        tails="",
        optional=_GLORA_PATHS,
        formula="W + W0 * A + B, A and B each a product, a column or a number",
    ),
    _tuner(
        "GRALORA",
        "gralora",
        tuner_options.gralora,
        tails="gralora_A gralora_B",
        optional="gralora_A_general.weight gralora_B_general.weight",
        formula="W + alpha / (r + hybrid_r) * (k x k blocks of products + B @ A)",
    ),
    _tuner("HIRA", "hira", tuner_options.hira, tails="hira_A hira_B", formula="W + W0 * (B @ A)"),
    _tuner(
        "HRA",
        "hra",
        tuner_options.hra,
        tails="hra_u",
        formula="W @ H_1 ... H_r, H = I - 2 u u' with |u| = 1",
    ),
    _tuner(
        "IA3",
        "ia3",
        tuner_options.ia3,
        tails="ia3_l",
        formula="W * l by outputs, the bias too; by inputs in feed-forward modules",
        changes_bias=True,
    ),
    _tuner(
        "LN_TUNING",
        "",
        tuner_options.ln_tuning,
        tails="ln_tuning_layers.weight",
        optional="ln_tuning_layers.bias",
        formula="replaces the norm's weight and bias",
    ),
    _tuner(
        "LOHA",
        "loha",
        tuner_options.loha,
        tails="hada_w1_a hada_w1_b hada_w2_a hada_w2_b",
        formula="W + alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)",
    ),
    _tuner(
        "LOKR",
        "lokr",
        tuner_options.lokr,
        tails="",
        optional="lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b",
        formula="W + alpha / r * kron(w1, w2), each whole or a product",
    ),
    _tuner(
        "MISS",
        "miss",
        tuner_options.miss,
        tails="miss_block",
        formula="W + B' repeated along the inputs; bat: W + W_blocks @ B + B; mini: repeated along the outputs too",
    ),
    _tuner(
        "OFT",
        "oft",
        tuner_options.oft,
        tails="oft_R.weight",
        formula="W @ R', R block-diagonal of Cayley transforms or their Neumann series",
    ),
    _tuner(
        "OSF",
        "osf",
        tuner_options.osf,
        tails="osf_svd_params.U_low osf_svd_params.S_low osf_svd_params.V_low",
        formula="W - (the k smallest singular components of W0) + U @ diag(S) @ V",
    ),
    _tuner(
        "PEANUT",
        "peanut",
        tuner_options.peanut,
        tails="peanut_A.weight peanut_B.weight",
        optional=_PEANUT_LAYERS,
        formula="W + scaling * (a small network on the columns of W0)",
    ),
    _tuner(
        "PVERA",
        "pvera",
        tuner_options.pvera,
        tails="pvera_lambda_b pvera_lambda_d",
        shared="pvera_A pvera_B",
        formula="as VERA, with the means of its distributions",
    ),
    _tuner(
        "RANDLORA",
        "randlora",
        tuner_options.randlora,
        tails="randlora_lambda randlora_gamma",
        optional="randlora_A randlora_B",  # each module has a copy of what is shared
        shared="randlora_A randlora_B",
        formula="W + randlora_alpha / r * sum_n B_n @ diag(lambda_n) @ A_n @ diag(gamma_n)",
    ),
    _tuner(
        "ROAD",
        "road",
        tuner_options.road,
        tails="road_theta road_alpha",
        formula="R @ W, R rotating and scaling pairs of outputs; the bias too",
        changes_bias=True,
    ),
    _tuner(
        "SHIRA",
        "shira",
        tuner_options.shira,
        tails="shira_weight shira_indices",
        formula="W[i, j] + value at the stored places",
    ),
    _tuner(
        "SUPERTUNING",
        "supertuning",
        tuner_options.supertuning,
        tails="supertuning_values supertuning_indices",
        optional="supertuning_lora_A.weight supertuning_lora_B.weight",
        formula="W.flat[i] + value at the stored places, + lora_alpha / r * B @ A",
    ),
    _tuner(
        "TRAINABLE_TOKENS",
        "rows",
        tuner_options.trainable_tokens,
        tails="trainable_tokens_delta",
        formula="replaces the rows token_indices",
    ),
    _tuner(
        "UNILORA",
        "unilora",
        tuner_options.unilora,
        tails="unilora_indices_A unilora_indices_B unilora_scales_A unilora_scales_B",
        shared="unilora_theta_d",
        formula="W + (theta[I_B] * S_B) @ (theta[I_A] * S_A)",
    ),
    _tuner(
        "VBLORA",
        "vblora",
        tuner_options.vblora,
        tails="",
        optional=f"{_LOGITS} {_TOP.format('A')} {_TOP.format('B')}",
        shared="vblora_vector_bank",
        formula="W + B @ A, both mixtures of the bank's vectors",
    ),
    _tuner(
        "VERA",
        "vera",
        tuner_options.vera,
        tails="vera_lambda_b vera_lambda_d",
        shared="vera_A vera_B",
        formula="W + diag(lambda_b) @ B[:out] @ diag(lambda_d) @ A[:, :in]",
    ),
    _tuner(
        "WAVEFT",
        "waveft",
        tuner_options.waveft,
        tails="waveft_spectrum",
        formula="W + scaling * idwt2(coefficients at places drawn from random_loc_seed)",
    ),
)
TUNERS: dict[str, Tuner] = {tuner.peft_type: tuner for tuner in _ALL}

_PROMPT = "it trains virtual tokens that are put before the input, and changes no weight"
UNMERGEABLE: dict[str, str] = {
    "ADAMSS": "which outputs its parts belong to comes from a clustering that is not saved",
    "ADAPTION_PROMPT": "it adds trained tokens to the attention of each layer, and changes no weight",
    "CARTRIDGE": "it trains a cache of keys and values that is put before the input, and changes no weight",
    "CPT": _PROMPT,
    "FROD": "one of its factors is recomputed from the base by a solver whose rounding is part of the training",
    "LILY": "a router chooses its factors by the input",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "POLY": "a router mixes its factors by the task",
    "PREFIX_TUNING": "it trains keys and values that are put before those of the input, and changes no weight",
    "PROMPT_TUNING": _PROMPT,
    "PSOFT": "it depends on the signs of singular vectors, which are not saved and differ between machines",
    "P_TUNING": _PROMPT,
    "SHADOW": "a second network runs beside the model and depends on the input",
    "TINYLORA": "which of its shared vectors a module has depends on the order of modules, which is not saved",
    "XLORA": "a classifier mixes its adapters by the input",
}
