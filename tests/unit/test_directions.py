"""The house keeps its shape: which folder may import which, no circle, no function with a parade of parameters.

Everything here is read with `ast`, so that imports inside functions and under TYPE_CHECKING count as well. A table of
exceptions may only shrink: an exception that nothing needs any more fails too.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = ("workflows", "verify", "calibration", "recipes")
MOST_PARAMETERS = 6

#: What a verification needs of calibration to know a checkpoint, a family and a plan.
FAMILIES = ("calibration/checkpoint", "calibration/families", "calibration/families/registry")
KNOWING = (*FAMILIES, "calibration/plan")
#: The same as a run needs it, with what it keeps in its directory.
RUNNING = (*KNOWING, "calibration/runs")
#: Folder, or module that differs from its folder -> what it may import beside itself. All may import `recipes`.
ARROWS: dict[str, tuple[str, ...]] = {
    "recipes": (),
    "calibration": (),
    "calibration/checkpoint": (),
    "calibration/checkpoint/writer": ("calibration/checkpoint",),
    "calibration/families": ("calibration/checkpoint",),
    "calibration/families/wrapped": ("calibration/checkpoint", "calibration/families"),
    "calibration/families/hub_tensors": ("calibration/checkpoint", "calibration/families", "calibration/families/wrapped"),
    "calibration/families/derived": (
        "calibration/checkpoint", "calibration/families", "calibration/families/hub_tensors", "calibration/families/wrapped",
    ),
    "calibration/families/cut": ("calibration/families",),
    "calibration/families/registry": ("calibration/checkpoint", "calibration/families", "calibration/families/derived"),
    "calibration/plan": (*FAMILIES, "calibration/families/cut"),
    "calibration/data": FAMILIES,
    "calibration/model": (*KNOWING, "calibration/families/wrapped"),
    "calibration/runs": KNOWING,
    "calibration/engine": (*RUNNING, "calibration/data", "calibration/model", "calibration/checkpoint/writer"),
    "calibration/convert": RUNNING,
    "calibration/forecast": (
        *RUNNING, "calibration/data", "calibration/model", "calibration/engine", "calibration/convert",
    ),
    "verify/inside_vllm": (),
    "verify/checks": (),
    "verify/unseen_text": (),
    "verify/known": KNOWING,
    "verify/structure": (*KNOWING, "verify/checks", "verify/known"),
    "verify/fidelity": (*KNOWING, "verify/checks", "verify/unseen_text", "calibration/data", "calibration/model"),
    "verify/accuracy": ("calibration/checkpoint", "verify/checks"),
    "verify/serving": (*KNOWING, "verify/checks", "verify/unseen_text", "verify/accuracy"),
    "verify/report": ("verify/checks", "verify/accuracy"),
    "verify/proof": (*KNOWING, "verify/checks", "verify/fidelity"),
    "verify": (
        *KNOWING, "verify/checks", "verify/known", "verify/structure", "verify/fidelity", "verify/serving", "verify/report",
        "verify/proof",
    ),
    "workflows": (*RUNNING, "calibration/convert", "verify/report"),
    "workflows/run": (
        *RUNNING, "calibration/data", "calibration/model", "calibration/engine", "calibration/convert", "calibration/forecast",
        "verify/accuracy", "verify/checks", "verify/known", "verify", "verify/proof", "verify/serving", "verify/report",
        "workflows",
    ),
    "workflows/publish": (
        *RUNNING, "verify", "verify/checks", "verify/proof", "verify/report", "workflows", "workflows/run",
    ),
    "workflows/batch": (
        *RUNNING, "calibration/forecast", "verify/accuracy", "verify/checks", "verify/serving", "verify/report", "workflows",
        "workflows/run",
    ),
    "workflows/compare": (
        "calibration/checkpoint", "calibration/runs", "verify", "verify/accuracy", "verify/checks", "verify/report",
        "workflows/run", "workflows/batch",
    ),
    "workflows/batch/cluster": (*RUNNING, "workflows", "workflows/batch"),
    "workflows/batch/executors": ("workflows/batch", "workflows/batch/cluster"),
    "workflows/batch/__main__": ("workflows", "workflows/batch", "workflows/batch/executors", "verify/report"),
}  # fmt: skip
#: Package -> the only folders that may import it. Who checks a plan or a header must not wait seconds for transformers.
PACKAGES = {
    "llmcompressor": ("calibration/model", "calibration/engine", "calibration/forecast"),
    "compressed_tensors": ("calibration/model", "calibration/engine", "calibration/forecast"),
    "transformers": (
        "calibration/data",
        "calibration/model",
        "calibration/families/hub_tensors",
        "calibration/families/derived",
        "calibration/families/cut",
        "calibration/families/wrapped",
        "verify/structure",
    ),
    "vllm": ("verify/inside_vllm",),
    "model_signing": (),
    "huggingface_hub": ("calibration/checkpoint", "workflows/publish"),
    "submitit": ("workflows/batch/cluster",),
}
#: All that recipes are read and checked with.
RECIPES_USE = {"pydantic", "pydantic_core", "yaml", "regex"}

_VLLM = "takes what vLLM hands the kernel that it stands in for"
#: `module.function` -> why it takes more than six parameters.
PARAMETERS: dict[str, str] = {
    **{
        f"verify.inside_vllm.cpu_deepseek_v4.{name}": _VLLM
        for name in (
            "compute_prefill_gather_lens", "compressed_slot_mapping", "build_prefill_chunk_metadata", "route",
            "hyper_connection_pre", "hyper_connection_head",
        )
    },
}  # fmt: skip


class Import(NamedTuple):
    """`name` is the imported module of this project, or another package's first name."""

    module: str
    name: str
    where: str


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file, parsed once."""
    return ast.parse(path.read_text())


def sources(*folders: str) -> dict[str, Path]:
    """Module name -> file, of every module below the folders."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources(*PROJECT)


def imports(modules: dict[str, Path]) -> Iterator[Import]:
    """Every import statement, wherever it stands."""
    for module, path in modules.items():
        for node in ast.walk(tree(path)):
            names: Iterable[str] = ()
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level and node.module, f"{path}:{node.lineno}: a relative import; write the whole name"
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in modules else node.module for name in inner]
            for name in names:
                own = name.partition(".")[0] in (*PROJECT, "tests")
                where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                yield Import(module, name if own else name.partition(".")[0], where)


IMPORTS = list(imports(MODULES))


def place(module: str) -> str:
    """The entry of ARROWS for a module: its own, or its folder's."""
    whole = module.replace(".", "/")
    if whole in ARROWS or MODULES[module].name == "__init__.py":
        return whole
    return whole.rpartition("/")[0]


def test_every_folder_has_a_line_in_the_table_and_the_table_names_what_is_there() -> None:
    assert {place(module) for module in MODULES} - ARROWS.keys() == set()
    named = ARROWS.keys() | {name for allowed in ARROWS.values() for name in allowed}
    assert {name for name in named if name.replace("/", ".") not in MODULES} == set()


def test_imports_follow_the_arrows() -> None:
    wrong = [
        f"{where}: {place(module)} must not import {name}"
        for module, name, where in IMPORTS
        if name.partition(".")[0] in PROJECT and place(name) not in (place(module), "recipes", *ARROWS[place(module)])
    ]
    assert wrong == []


def test_the_table_itself_points_down_only() -> None:
    assert _circle({name: set(allowed) for name, allowed in ARROWS.items()}) is None


def test_no_circle_between_modules() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, name, _ in IMPORTS:
        if name in MODULES and name != module:
            graph[module].add(name)
    assert _circle(graph) is None


def _circle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return None


def test_what_runs_inside_vllm_imports_nothing_of_this_project() -> None:
    inside = {name: path for name, path in MODULES.items() if name.startswith("verify.inside_vllm")}
    assert len(inside) > 1
    assert [found for found in imports(inside) if found.name.partition(".")[0] in (*PROJECT, "tests")] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_heavy_packages_are_imported_in_their_folders_alone(package: str) -> None:
    using = {place(found.module): found.where for found in IMPORTS if found.name == package}
    assert {folder: where for folder, where in using.items() if folder not in PACKAGES[package]} == {}
    assert using.keys() == set(PACKAGES[package]), "a folder that no longer needs it leaves the table"


def test_recipes_are_read_with_pydantic_yaml_and_regex_alone() -> None:
    known = {*PROJECT, *sys.stdlib_module_names, *RECIPES_USE}
    assert [found for found in imports(sources("recipes")) if found.name.partition(".")[0] not in known] == []


def test_nothing_imports_the_tests_and_no_test_another() -> None:
    """What tests share lies in modules that are no tests."""
    assert [found for found in IMPORTS if found.name.startswith("tests")] == []
    named = [(found, found.name.rpartition(".")[2]) for found in imports(sources("tests")) if "." in found.name]
    assert [found for found, last in named if last.startswith("test_") or last == "conftest"] == []


def test_unit_tests_lie_in_folders_named_as_what_they_test() -> None:
    """Those of the tests' own models and benchmarks too; at the top stand those of the whole house."""
    files = [path.relative_to(ROOT / "tests" / "unit") for path in sources("tests/unit").values()]
    homes = {path.parts[0] for path in files if len(path.parts) > 1}
    assert homes - {folder.rpartition("/")[2] for folder in ARROWS} == {"models", "benchmarks"}
    top = {path.name for path in files if len(path.parts) == 1 and path.name.startswith("test_")}
    assert top == {"test_directions.py", "test_docs.py"}


#: What a command needs before its imports: it ends them on a signal.
AT_THE_START = ("recipes.streams", "recipes.errors")


def test_a_folder_says_in_a_docstring_what_it_holds_and_imports_nothing() -> None:
    """Who reads the state of a run must not wait for torch."""
    folders = {name: path for name, path in MODULES.items() if path.name == "__init__.py"}
    assert [name for name, path in folders.items() if not ast.get_docstring(tree(path))] == []
    assert [found for found in imports(folders) if found.name not in (*sys.stdlib_module_names, *AT_THE_START)] == []
    light = {name: MODULES[name] for name in AT_THE_START}
    assert [found for found in imports(light) if found.name not in (*sys.stdlib_module_names, *AT_THE_START)] == []


def test_an_installation_holds_every_folder() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(name for name, path in MODULES.items() if path.name == "__init__.py")


def test_no_function_takes_more_than_six_parameters() -> None:
    found = {
        name: f"{path.relative_to(ROOT)}:{line}: {name} takes {count} parameters"
        for module, path in MODULES.items()
        for name, line, count in _functions(tree(path), module, in_class=False)
        if count > MOST_PARAMETERS
    }
    assert [text for name, text in found.items() if name not in PARAMETERS] == []
    assert PARAMETERS.keys() - found.keys() == set(), "these need no exception any more: take them out of PARAMETERS"


def _functions(node: ast.AST, prefix: str, in_class: bool) -> Iterator[tuple[str, int, int]]:
    """Name, line and number of parameters (self and cls apart) of every function below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            name, given = f"{prefix}.{child.name}", child.args
            static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in child.decorator_list)
            count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) - (in_class and not static)
            yield name, child.lineno, count
            yield from _functions(child, name, in_class=False)
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}.{child.name}", in_class=True)
        else:
            yield from _functions(child, prefix, in_class)
