"""Compiles the package's C source where there is a compiler; without one the package is pure Python, and slower."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("distmerge/numerics/kernels/kernels.c")
LIBRARY = Path("distmerge/numerics/libkernels.so")
# A product and a sum are one operation wherever the source has one, and nothing else is reordered: bits are fixed.
FLAGS = ("-O3", "-ffp-contract=fast", "-fno-trapping-math", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")


class CompiledKernels(BuildHookInterface):  # type: ignore[misc]
    """Puts the shared library beside its source, into wheels and into editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, unless there is no compiler, it fails, or DISTMERGE_PURE is set; then an editable installation has
        no library from an earlier time either."""
        if self.target_name != "wheel":
            return
        root, pure = Path(self.root), bool(os.environ.get("DISTMERGE_PURE"))
        library = None if pure else compiled(root)
        if library is None and version == "editable":
            (root / LIBRARY).unlink(missing_ok=True)
        if library is None and not pure:
            self.app.display_warning("no working C compiler: the package does without compiled kernels, and is slower")
        if library is not None and version != "editable":
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            build_data["force_include"][str(library)] = str(library.relative_to(self.root))


def compiled(root: Path) -> Path | None:
    """The shared library, made anew, or None."""
    library = root / LIBRARY
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]  # `ccache gcc`, or with options
    if shutil.which(compiler[0]) is None:
        return None
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((root / SOURCE).parent.glob("*.[ch]"))))
    told = f'-DSOURCE="{digest.hexdigest()}"'  # compiled.py holds it against the sources that it finds
    made = library.with_suffix(f".{os.getpid()}.tmp")
    done = subprocess.run([*compiler, *FLAGS, told, str(root / SOURCE), "-o", str(made)], check=False)  # noqa: S603
    if done.returncode != 0:
        made.unlink(missing_ok=True)
        return None
    made.replace(library)  # a process may have the old one loaded
    return library
