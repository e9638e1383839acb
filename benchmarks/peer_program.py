"""One tool merges one adapter: PROGRAM BASE ADAPTER OUTPUT. Prints when its imports were done, when the model was
loaded (where a tool loads one) and when the output was there, as JSON lines of Unix seconds."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def distmerge(base: Path, adapter: Path, output: Path) -> None:
    """A rank of `distmerge merge`, under torchrun or alone, with the digest that BENCH_DIGEST names."""
    from distmerge import AdapterChoice, MergeConfig
    from distmerge.merge import merge as _  # noqa: F401  # what run() imports is imported now
    from distmerge.run import run

    stamp("imported")
    digest: dict[str, Any] = {"digest": name} if (name := os.environ.get("BENCH_DIGEST")) else {}
    run(MergeConfig(base=base, adapters=(AdapterChoice(folder=adapter),), output=output, **digest))


def peft(base: Path, adapter: Path, output: Path) -> None:
    """PEFT's way: the model loaded by transformers, `merge_and_unload`, `save_pretrained`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  # the class that Auto will import

    stamp("imported")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = PeftModel.from_pretrained(model, adapter)
    stamp("loaded")
    model.merge_and_unload().save_pretrained(output)


def dequantized(base: Path, adapter: Path, output: Path) -> None:
    """The same for a base in NF4, which transformers dequantizes first."""
    import bitsandbytes  # noqa: F401
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    stamp("imported")
    model: Any = AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"}).dequantize()
    model = PeftModel.from_pretrained(model, adapter)
    stamp("loaded")
    # As the checkpoint's own format transformers 5.23 cannot save it: NotImplementedError.
    model.merge_and_unload().save_pretrained(output, save_original_format=False)


def axolotl(base: Path, adapter: Path, output: Path) -> None:
    """axolotl's memory-efficient merge, shard by shard."""
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    stamp("imported")
    merge_lora_sharded_efficient(base, adapter, output, device="cpu")


def unsloth(base: Path, adapter: Path, output: Path) -> None:
    """Unsloth-zoo's merge, which takes a model that training holds already: loading it is told apart."""
    os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"  # its own switch for machines without a GPU
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401
    from unsloth_zoo.saving_utils import merge_and_overwrite_lora

    stamp("imported")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = PeftModel.from_pretrained(model, adapter)
    stamp("loaded")
    merge_and_overwrite_lora(lambda name, **_: name, model, save_directory=str(output))


PROGRAMS: dict[str, Callable[[Path, Path, Path], None]] = {
    program.__name__: program for program in (distmerge, peft, dequantized, axolotl, unsloth)
}


def stamp(event: str) -> None:
    """Prints the time of an event; line and newline in one write, since ranks share the pipe."""
    sys.stdout.flush()
    os.write(1, f"{json.dumps({'event': event, 'time': time.time()})}\n".encode())


def main() -> None:
    program, base, adapter, output = sys.argv[1:]
    PROGRAMS[program](Path(base), Path(adapter), Path(output))
    stamp("done")


if __name__ == "__main__":
    main()
