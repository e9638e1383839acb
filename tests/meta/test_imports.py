"""The shape of the package: imports go downward, each third-party package has one door, pages stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import distmerge
from tests.conftest import environment

PACKAGE = Path(distmerge.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# From the bottom up. A module may import what lies below it or beside it.
LAYERS = [
    ["redaction"],
    ["errors"],
    ["storage", "config", "progress", "parent", "launcher", "clock"],
    ["numerics", "checkpoint", "world"],
    ["adapter"],
    [
        *(
            "grid",
            "layout",
            "forms",
            "outputs",
            "keeping",
            "fingerprint",
            "plan",
            "page_cache",
            "manifest",
            "dense",
            "untouched",
            "reader",
            "lanes",
            "stream",
            "simulate",
        ),
        *("rounding", "packer", "blocks", "first_pass", "shards", "doubts"),
    ],
    ["budget", "room", "claim", "input_files"],
    ["journal", "work", "unchanged", "follower", "verify", "receipt", "report", "publish", "share", "runlog"],
    ["merge", "audit", "inspection", "demo", "evaluation"],
    ["run"],
    ["cli"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
DOORS = {
    "torch.distributed": {"distmerge.world"},
    "torch._C._distributed_c10d": {"distmerge.world"},
    "yaml": {"distmerge.config"},
    "click": {"distmerge.cli"},
    "rich": {"distmerge.progress"},
    "huggingface_hub": set(),
    "bitsandbytes": set(),
    "matplotlib": {"distmerge.report.figures"},
    "transformers": {
        *("distmerge.adapter.naming.conversion", "distmerge.adapter.naming.linears"),
        "distmerge.evaluation.models",
    },
    "peft": {"distmerge.evaluation.models"},
    "accelerate": {"distmerge.evaluation.models"},
    "isal": {"distmerge.storage.checksums"},
    "xxhash": {"distmerge.storage.checksums"},
    "pickle": set(),
}
PURE = ("os", "pathlib", "io", "logging", "distmerge.storage", "distmerge.world")


def imports(module: str) -> set[str]:
    """Everything that `module` imports, inside functions too, but not what only type checkers see."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {str(node.module), *(name for name in names if name in MODULES)}
    return found


def own_imports(module: str) -> set[str]:
    """The modules of distmerge that `module` imports, the package's own front apart."""
    return {name for name in imports(module) if name in MODULES and name != "distmerge"}


def room(module: str) -> str:
    return module.split(".")[1]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


INNER = sorted(module for module in MODULES if module != "distmerge")


def test_every_module_has_a_level() -> None:
    assert {room(module) for module in INNER} == LEVEL.keys()


@pytest.mark.parametrize("module", INNER)
def test_a_module_imports_only_downward(module: str) -> None:
    upward = {name for name in own_imports(module) if LEVEL[room(name)] > LEVEL[room(module)]}
    assert not upward


def test_imports_have_no_circle() -> None:
    try:
        TopologicalSorter({module: own_imports(module) for module in INNER}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("package", sorted(DOORS))
def test_a_third_party_package_has_one_door(package: str) -> None:
    users = {module for module in MODULES if any(within(name, package) for name in imports(module))}
    doors = DOORS[package]  # modules, or whole rooms
    assert {next((door for door in doors if within(user, door)), user) for user in users} == doors


@pytest.mark.parametrize("module", [module for module in MODULES if within(module, "distmerge.numerics")])
def test_math_knows_no_files_and_no_ranks(module: str) -> None:
    assert not {name for name in imports(module) if any(within(name, impure) for impure in PURE)}


@pytest.mark.parametrize("module", [m for m in MODULES if within(m, "distmerge.storage")])
def test_storage_knows_no_tensors(module: str) -> None:
    assert not {name for name in imports(module) if within(name, "torch")}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_is_at_most_400_lines_and_a_function_at_most_60(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


@pytest.mark.parametrize("module", ["distmerge", "distmerge.cli.main", "distmerge.config", "distmerge.errors"])
def test_starting_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; print([n for n in ('torch', 'transformers', 'yaml', 'rich') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout == "[]\n"


def test_what_the_package_offers_is_there_and_stays_callable() -> None:
    code = (
        "import distmerge, distmerge.plan, distmerge.merge, distmerge.verify, distmerge.audit, importlib\n"
        "from distmerge.verify import check_records\n"
        "assert importlib.import_module('distmerge.plan').make_plan\n"
        "assert all(callable(getattr(distmerge, name)) for name in distmerge.__all__)\n"
        "from distmerge import *\n"
        "print(sorted(name for name in distmerge.__all__ if callable(globals()[name])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout == f"{sorted(distmerge.__all__)}\n"
    assert {"merge", "plan", "verify", "MergeConfig", "AdapterChoice"} <= set(distmerge.__all__)
