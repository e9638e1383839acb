"""The output's tensors with their dtypes, and the files that they go into."""

from __future__ import annotations

from collections import Counter

from distmerge.checkpoint.base import Base
from distmerge.checkpoint.header import FLOATS
from distmerge.checkpoint.packed_form import PackedForm
from distmerge.config import DEFAULT_SHARD_NBYTES, DTYPES, MergeConfig
from distmerge.forms import Forms
from distmerge.layout import Wanted, pack_shards
from distmerge.outputs import Output, Outputs


def make_shards(base: Base, outputs: Outputs, forms: Forms, config: MergeConfig) -> dict[str, list[Wanted]]:
    """The output's tensors by the file that they go into, in its order: the base's own files, or as many as it takes
    where a packed tensor becomes dense, a dense one packed, or a size is given."""
    common = _common_dtype(base)
    wanted = []
    for output in outputs.tensors.values():
        # A parameter of the adapter's is stored as training held it; the model has a dtype of its own.
        stored = outputs.base.tensors.get(output.name)
        own = output.source.dtype if not output.origin else stored.dtype if stored is not None else common
        wanted.append(_want(output, own, DTYPES[config.dtype], forms.by_name.get(output.name)))
    if base.packed or forms.by_name or config.max_shard_size is not None:
        return pack_shards(wanted, config.max_shard_size or DEFAULT_SHARD_NBYTES)
    shards: dict[str, list[Wanted]] = {mark.name: [] for mark in base.files}
    for tensor in wanted:
        # What the base has under this name, or what its copy comes from, says the file; a new tensor goes to the last.
        stored = outputs.base.tensors.get(tensor.name, None if tensor.origin else tensor.source)
        shards[stored.data.file if stored is not None else base.files[-1].name].append(tensor)
    return {name: shard for name, shard in shards.items() if shard}


def _common_dtype(base: Base) -> str:
    """The float dtype of most of the base's elements."""
    counts: Counter[str] = Counter()
    for stored in base.tensors.values():
        counts[stored.dtype] += stored.numel * (stored.dtype in FLOATS)
    return counts.most_common(1)[0][0]


def _want(output: Output, own: str, dtype: str | None, form: PackedForm | None) -> Wanted:
    """The output tensor; `own` is the dtype that it has without --dtype."""
    # F64 stays: torch rounds it to 16 bits by way of float32, that is twice.
    out = dtype if dtype is not None and own in FLOATS and not output.as_is else own
    same = out == output.source.dtype and output.source.packing is None and form is None
    return Wanted(
        kind="merge" if output.changes else "copy" if same else "convert",
        name=output.name,
        source=output.source,
        origin=output.origin,
        dtype=out,
        changes=output.changes,
        also=output.also,
        twin=output.twin,
        form=form,
    )
