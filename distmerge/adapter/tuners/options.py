"""What the arithmetic of each tuner needs to know, read from adapter_config.json and headers, all of it checked."""

from __future__ import annotations

import math
import re
from typing import Any

from distmerge.adapter.tuners.checks import ANY, CONFIG, Tuned, finite, pair
from distmerge.errors import InputError, shown
from distmerge.numerics.wavelets import FILTERS

# By their names in transformers' ACT2FN; distmerge.numerics.decompositions computes them.
ACTIVATIONS = (
    *("gelu", "gelu_new", "gelu_pytorch_tanh", "leaky_relu", "linear"),
    *("relu", "sigmoid", "silu", "swish", "tanh"),
)
MAX_DEPTH = 8
_MAX_TERMS = 64


def adalora(tuned: Tuned) -> dict[str, Any]:
    if tuned.shapes.get("lora_A") == (0, tuned.into):  # all of its rank was pruned
        r, _ = tuned.shape("lora_A", 0, tuned.into)
        tuned.shape("lora_B", tuned.out, 0)
    else:
        r = pair(tuned, "lora_A", "lora_B")
    tuned.shape("lora_E", r, 1)
    initial = tuned.integer("init_r", least=max(r, 1))
    alpha = tuned.number("lora_alpha")
    return {"scaling": (alpha if alpha > 0 else initial) / (initial + 1e-5)}


def beft(tuned: Tuned) -> dict[str, Any]:
    tuned.shape("beft_bias", 1, tuned.out)
    return {}


def boft(tuned: Tuned) -> dict[str, Any]:
    tuned.shape("boft_s", tuned.out, 1)
    factors, blocks, size, _ = tuned.shape("boft_R", ANY, ANY, ANY, ANY)
    fits = blocks * size == tuned.into and tuned.shapes["boft_R"][3] == size
    if factors > 1:
        fits = fits and size % 2 == 0 and factors <= 64 and blocks % (1 << (factors - 1)) == 0
    if not fits:
        raise tuned.error(f"'boft_R' has shape {tuned.shapes['boft_R']}: no butterfly of {tuned.into} inputs")
    return {}


def bone(tuned: Tuned) -> dict[str, Any]:
    return _miss(tuned, "bone_block", ("bat",))


def c3a(tuned: Tuned) -> dict[str, Any]:
    rows, cols, size = tuned.shape("c3a_kernel", ANY, ANY, ANY)
    if (rows * size, cols * size) != (tuned.out, tuned.into):
        raise tuned.error(f"'c3a_kernel' {(rows, cols, size)} does not tile a weight ({tuned.out}, {tuned.into})")
    return {}


def deft(tuned: Tuned) -> dict[str, Any]:
    _, r = tuned.shape("deft_P", tuned.out, ANY)
    if r > tuned.out:
        raise tuned.error(f"'deft_P' has more columns ({r}) than rows ({tuned.out})")
    method = tuned.choice("decomposition_method", ("qr", "relu"))
    if tuned.flag("para"):
        if "deft_R" in tuned.shapes:
            raise tuned.error("para is set, but there is a tensor 'deft_R'")
        return {"decomposition": method}
    tuned.shape("deft_R", r, tuned.into)
    alpha = tuned.config.get("alpha")
    return {"decomposition": method, "scaling": finite(alpha, "alpha") / r if alpha else 1.0}


def delora(tuned: Tuned) -> dict[str, Any]:
    pair(tuned, "delora_A", "delora_B")
    tuned.shape("delora_lambda", 1)
    tuned.shape("delora_w_norm", tuned.into)
    return {}


def fourierft(tuned: Tuned) -> dict[str, Any]:
    return {**_places(tuned, "fourierft_spectrum"), "scaling": tuned.number("scaling")}


def _places(tuned: Tuned, name: str) -> dict[str, Any]:
    (count,) = tuned.shape(name, ANY)
    if count > tuned.out * tuned.into:
        raise tuned.error(f"{name!r} has {count} values, more than the weight ({tuned.out}, {tuned.into})")
    return {"seed": tuned.integer("random_loc_seed", least=-(2**63), most=2**64 - 1)}


def glora(tuned: Tuned) -> dict[str, Any]:
    of_bias = {f"glora_{path}.{part}" for path in "CDE" for part in ("X", "Xd", "Xu")}
    if trained := sorted(of_bias & tuned.shapes.keys()):
        raise tuned.error(
            f"tensor {trained[0]!r} makes a new bias out of bias and weight; that is not supported",
            "train with config_C and config_D_E set to 'none'",
        )
    for path in ("glora_A", "glora_B"):
        parts = [part for part in ("X", "Xd", "zeros") if f"{path}.{part}" in tuned.shapes]
        if parts == ["X"]:
            scalar = len(tuned.shapes[f"{path}.X"]) == 1
            tuned.shape(f"{path}.X", *((1,) if scalar else (tuned.out, 1)))
        elif parts == ["zeros"]:
            tuned.shape(f"{path}.zeros", tuned.out, tuned.into)
        elif parts == ["Xd"]:
            pair(tuned, f"{path}.Xu", f"{path}.Xd")
        else:
            raise tuned.error(f"the tensors of {path!r} are of no kind or of several: {parts}", "the file is damaged")
    return {}


def gralora(tuned: Tuned) -> dict[str, Any]:
    blocks, width, r = tuned.shape("gralora_A", ANY, ANY, ANY)
    tuned.shape("gralora_B", blocks, r, tuned.out // blocks)
    if width * blocks != tuned.into or tuned.out % blocks or r % blocks:
        raise tuned.error(f"'gralora_A' {(blocks, width, r)} does not tile a weight ({tuned.out}, {tuned.into})")
    hybrid = 0
    if {"gralora_A_general.weight", "gralora_B_general.weight"} & tuned.shapes.keys():
        hybrid = pair(tuned, "gralora_A_general.weight", "gralora_B_general.weight")
    if tuned.integer("hybrid_r", least=0) != hybrid:
        raise tuned.error(f"hybrid_r is {tuned.config['hybrid_r']}, but the file's general factors have rank {hybrid}")
    return {"scaling": tuned.number("alpha") / (r + hybrid)}


def hira(tuned: Tuned) -> dict[str, Any]:
    pair(tuned, "hira_A", "hira_B")
    return {}


def hra(tuned: Tuned) -> dict[str, Any]:
    tuned.shape("hra_u", tuned.into, ANY)
    return {"orthogonal": tuned.flag("apply_GS")}


def ia3(tuned: Tuned) -> dict[str, Any]:
    feedforward = tuned.shapes.get("ia3_l") == (1, tuned.into)
    if feedforward and tuned.into == 1:
        raise tuned.error("'ia3_l' has one element: it does not tell inputs from outputs")
    tuned.shape("ia3_l", *((1, tuned.into) if feedforward else (tuned.out, 1)))
    return {"keeps_bias": feedforward}


def ln_tuning(tuned: Tuned) -> dict[str, Any]:
    return {}


def loha(tuned: Tuned) -> dict[str, Any]:
    r = pair(tuned, "hada_w1_b", "hada_w1_a")
    pair(tuned, "hada_w2_b", "hada_w2_a", r=r)
    return {"scaling": tuned.by_pattern("alpha_pattern", tuned.number("alpha")) / r}


def lokr(tuned: Tuned) -> dict[str, Any]:
    ranks: set[float] = set()
    sizes = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in tuned.shapes:
            if {f"{name}_a", f"{name}_b"} & tuned.shapes.keys():
                raise tuned.error(f"there is {name!r} and factors of it", "the file is damaged")
            sizes.append(tuned.shape(name, ANY, ANY))
        else:
            rows, r = tuned.shape(f"{name}_a", ANY, ANY)
            sizes.append((rows, tuned.shape(f"{name}_b", r, ANY)[1]))
            ranks.add(r)
    (a, c), (b, d) = sizes
    if (a * b, c * d) != (tuned.out, tuned.into):
        raise tuned.error(f"factors {(a, c)} and {(b, d)} do not make a weight ({tuned.out}, {tuned.into})")
    # Without factors nothing in the file has the rank, which only sets the scale then.
    ranks = ranks or {tuned.by_pattern("rank_pattern", tuned.integer("r"))}
    if len(ranks) > 1 or min(ranks) <= 0:
        raise tuned.error(f"the ranks of its factors are {sorted(ranks)}")
    return {"scaling": tuned.by_pattern("alpha_pattern", tuned.number("alpha")) / ranks.pop()}


def miss(tuned: Tuned) -> dict[str, Any]:
    return _miss(tuned, "miss_block", ("bat", "mini"))


def _miss(tuned: Tuned, name: str, modes: tuple[str, ...]) -> dict[str, Any]:
    mode = tuned.config.get("init_weights")
    if mode is not None and type(mode) is not bool:
        mode = tuned.choice("init_weights", modes)
    if mode == "bat":
        _, r, _ = tuned.shape(name, ANY, ANY, ANY)
        if tuned.shapes[name] != (tuned.out // r, r, r) or tuned.out % r or tuned.into % r:
            raise tuned.error(f"{name!r} {tuned.shapes[name]} does not tile a weight ({tuned.out}, {tuned.into})")
        return {}
    period = tuned.integer("mini_r") if mode == "mini" else tuned.out
    r, _ = tuned.shape(name, ANY, period)
    if r > tuned.into or tuned.out % period:
        raise tuned.error(f"{name!r} {(r, period)} does not tile a weight ({tuned.out}, {tuned.into})")
    return {}


def oft(tuned: Tuned) -> dict[str, Any]:
    blocks, count = tuned.shape("oft_R.weight", ANY, ANY)
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    shared = tuned.flag("block_share")
    if size * (size - 1) // 2 != count or (tuned.into % size if shared else blocks * size != tuned.into):
        raise tuned.error(f"'oft_R.weight' {(blocks, count)} does not hold rotations of {tuned.into} inputs")
    if shared and blocks != 1:
        raise tuned.error(f"block_share is set, but 'oft_R.weight' holds {blocks} blocks")
    eps = tuned.number("eps") if tuned.flag("coft") else 0.0
    if eps < 0:
        raise InputError(f"eps must not be negative, got {eps}", where=CONFIG)
    options = {"block_size": size, "coft_eps": eps, "neumann_terms": 0, "halves_last": True}
    if tuned.flag("use_cayley_neumann"):
        terms = tuned.integer("num_cayley_neumann_terms", most=_MAX_TERMS)
        options |= {"neumann_terms": terms, "halves_last": _halves_last(tuned.config.get("peft_version"))}
    return options


def _halves_last(version: Any) -> bool:
    """True if PEFT `version` counts the last power of OFT's series once, as 0.18.0 does and older ones, which do not
    write their version, do not."""
    if version is None:
        return False
    numbers = re.match(r"(\d{1,4})\.(\d{1,4})(.*)", version) if isinstance(version, str) else None
    if numbers is None or ((numbers[1], numbers[2]) == ("0", "18") and "dev" in numbers[3]):
        raise InputError(
            f"peft_version {shown(version)} does not tell which series of OFT it trained",
            where=CONFIG,
            hint="the series changed in PEFT 0.18.0: write 0.17.1 or 0.18.0 there, whichever trained it",
        )
    return (int(numbers[1]), int(numbers[2])) >= (0, 18)


def osf(tuned: Tuned) -> dict[str, Any]:
    (k,) = tuned.shape("osf_svd_params.S_low", ANY)
    tuned.shape("osf_svd_params.U_low", tuned.out, k)
    tuned.shape("osf_svd_params.V_low", k, tuned.into)
    if k > min(tuned.out, tuned.into):
        raise tuned.error(f"{k} singular values are more than a weight ({tuned.out}, {tuned.into}) has")
    return {}


def peanut(tuned: Tuned) -> dict[str, Any]:
    r, _ = tuned.shape("peanut_A.weight", ANY, tuned.out)
    tuned.shape("peanut_B.weight", tuned.out, r)
    depth = tuned.integer("depth", least=0, most=MAX_DEPTH)
    for number in range(MAX_DEPTH):
        for name in (f"peanut_encoders.{number}.weight", f"peanut_decoders.{number}.weight"):
            if number < depth:
                tuned.shape(name, r, r)
            elif name in tuned.shapes:
                raise tuned.error(f"depth is {depth}, but there is a tensor {name!r}")
    return {"activation": tuned.choice("act_fn", ACTIVATIONS), "depth": depth, "scaling": tuned.number("scaling")}


def pvera(tuned: Tuned) -> dict[str, Any]:
    if tuned.flag("sample_at_inference"):
        raise InputError(
            "sample_at_inference is set: the model draws its weights anew at every call",
            where=CONFIG,
            hint="set it to false to merge the means",
        )
    return _vera(tuned, "pvera", means=2)


def vera(tuned: Tuned) -> dict[str, Any]:
    return _vera(tuned, "vera", means=1)


def _vera(tuned: Tuned, name: str, *, means: int) -> dict[str, Any]:
    tuned.shape(f"{name}_lambda_b", tuned.out)
    (length,) = tuned.shape(f"{name}_lambda_d", ANY)
    _shared(tuned, f"{name}_A", f"{name}_B")
    _, width = tuned.shape(f"{name}_A", length, ANY)
    height, r = tuned.shape(f"{name}_B", ANY, ANY)
    if r * means != length or width < tuned.into or height < tuned.out:
        raise tuned.error(
            f"'{name}_A' {(length, width)} and '{name}_B' {(height, r)} do not cover a weight ({tuned.out}, "
            f"{tuned.into})"
        )
    return {"in_features": tuned.into}


def _shared(tuned: Tuned, *names: str) -> None:
    for name in names:
        if name not in tuned.shapes:
            raise InputError(
                f"the adapter holds no {name!r}: it was saved with save_projection=False",
                where=CONFIG,
                hint="load it with PEFT and save it with save_projection=True",
            )


def randlora(tuned: Tuned) -> dict[str, Any]:
    small, large = sorted((tuned.out, tuned.into))
    r, bases = tuned.shape("randlora_lambda", ANY, ANY)
    tuned.shape("randlora_gamma", bases, small)
    _shared(tuned, "randlora_A", "randlora_B")
    _, repeats, width = tuned.shape("randlora_A", r, ANY, ANY)
    height, count, _ = tuned.shape("randlora_B", ANY, ANY, r)
    if width < small or height < large or count < bases or (repeats != 1 and repeats < bases):
        raise tuned.error(f"the shared bases do not cover a weight ({tuned.out}, {tuned.into})")
    scaling = tuned.number("randlora_alpha") / r
    return {"scaling": scaling, "large": large, "transposed": tuned.out < tuned.into}


def road(tuned: Tuned) -> dict[str, Any]:
    angles = {"road_1": 1, "road_2": 2, "road_4": 4}[tuned.choice("variant", ("road_1", "road_2", "road_4"))]
    group = tuned.integer("group_size", least=2)
    if group % 2 or tuned.out % group:
        raise tuned.error(f"group_size {group} does not divide {tuned.out} outputs into groups of pairs")
    for name in ("road_theta", "road_alpha"):
        tuned.shape(name, tuned.out * angles // 2)
    return {"group_size": group, "angles": angles}


def shira(tuned: Tuned) -> dict[str, Any]:
    (count,) = tuned.shape("shira_weight", ANY)
    tuned.shape("shira_indices", 2, count)
    return {}


def supertuning(tuned: Tuned) -> dict[str, Any]:
    (count,) = tuned.shape("supertuning_values", ANY)
    tuned.shape("supertuning_indices", count)
    if tuned.config.get("r") is None:
        if {"supertuning_lora_A.weight", "supertuning_lora_B.weight"} & tuned.shapes.keys():
            raise tuned.error("r is null, but there are low-rank factors")
        return {}
    r = pair(tuned, "supertuning_lora_A.weight", "supertuning_lora_B.weight", r=tuned.integer("r"))
    return {"scaling": tuned.number("lora_alpha") / r}


def trainable_tokens(tuned: Tuned) -> dict[str, Any]:
    indices = tuned.config.get("token_indices")
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise InputError(f"token_indices must be a list of integers, got {shown(indices)}", where=CONFIG)
    if len(set(indices)) != len(indices) or not all(0 <= index < tuned.out for index in indices):
        raise InputError(f"token_indices must be different rows of {tuned.out}, got {shown(indices)}", where=CONFIG)
    tuned.shape("trainable_tokens_delta", len(indices), tuned.into)
    return {"indices": indices}


def unilora(tuned: Tuned) -> dict[str, Any]:
    r = pair(tuned, "unilora_indices_A", "unilora_indices_B")
    pair(tuned, "unilora_scales_A", "unilora_scales_B", r=r)
    tuned.shape("unilora_theta_d", ANY)
    return {}


def vblora(tuned: Tuned) -> dict[str, Any]:
    vectors, length = tuned.shape("vblora_vector_bank", ANY, ANY)
    topk = tuned.integer("topk", most=vectors)
    if tuned.out % length or tuned.into % length:
        raise tuned.error(f"vectors of length {length} do not divide a weight ({tuned.out}, {tuned.into})")
    parts = {"A": (ANY, tuned.into // length), "B": (tuned.out // length, ANY)}
    ranks = set()
    for factor, tiles in parts.items():
        name = f"vblora_logits_{factor}"
        known = {name, f"{name}_topk_indices", f"{name}_topk_weights"} & tuned.shapes.keys()
        if known == {name}:
            found = tuned.shape(name, *tiles, vectors)
        elif name in known:
            raise tuned.error(f"there is {name!r} and the top of it", "the file is damaged")
        else:
            found = tuned.shape(f"{name}_topk_indices", *tiles, topk)
            tuned.shape(f"{name}_topk_weights", *found[:2], topk - 1)
        ranks.add(found[factor == "B"])
    if len(ranks) > 1:
        raise tuned.error(f"its two factors have ranks {sorted(ranks)}")
    return {"topk": topk}


def waveft(tuned: Tuned) -> dict[str, Any]:
    wavelet = tuned.choice("wavelet_family", tuple(FILTERS)) if tuned.flag("use_idwt") else ""
    return {**_places(tuned, "waveft_spectrum"), "scaling": tuned.number("scaling"), "wavelet": wavelet}
