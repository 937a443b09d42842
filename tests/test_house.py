"""The house rules as code: who may import whom, what importing may need, what no file may contain, what the docs name.

errors, version  <-  architectures  <-  quant  <-  kernels  <-  engine  <-  server  <-  tools, cli
quant's conversion side (conversion, reformat, card, algorithms) is used by tools and cli alone, directly or through
others; only what needs no calibration (algorithms.data_free and what that needs) serves `--quantize` too
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("architectures", "quant", "kernels", "engine", "server", "tools")
EVERYBODY = {"errors", "version"}
MAY_IMPORT = {
    "architectures": {"architectures"},
    "quant": {"architectures", "quant"},
    "kernels": {"quant", "kernels"},
    "engine": {"architectures", "quant", "kernels", "engine"},
    "server": {"engine", "server"},
}
# How a quantized weight is made, as against what it is: conversion only.
CONVERSION = ("quant.algorithms", "quant.conversion", "quant.reformat", "quant.card")
# What the HTTP server's process runs: torch must not even be loaded.
TORCH_FREE = (
    "",
    "server",
    "engine.client",
    "engine.messages",
    "engine.request",
    "engine.config",
    "engine.text",
    "engine.grammar.structured_outputs",
    "engine.grammar.structural_tag",
    "quant.locate",
    "quant.files",
    "architectures.config",
    "quant.hub",
    "quant.formats.gguf.container",
    "quant.formats.gguf.tokenizer",
    "quant.formats.gguf.side_files",
)
READS_ENVIRONMENT = {"__init__", "tools.serve_command", "engine.config"}
CALIBRATED = ("quant.algorithms.awq", "quant.algorithms.gptq")
MAX_FILE_LINES, MAX_BODY_LINES = 400, 60  # of a function: its signature and docstring are free
LONG_FILES: dict[str, str] = {  # file -> why it is one piece
    "quant/scheme.py": "schemes and their readers",
}
LONG_FUNCTIONS = {  # a @triton.jit kernel is one function: what it holds in registers cannot be handed around
    "kernels/attention/attend.py": {"attend_kernel"},
    "kernels/fused/rope_kernels.py": {"rope_kernel"},
}


def _modules() -> dict[str, Path]:
    """Dotted name below `nibble` ("" is the package itself) -> file."""
    top = [
        file for file in sorted(ROOT.glob("*.py")) if file.name != "setup.py"
    ]  # which is no part of the package
    files = [*top, *(f for room in ROOMS for f in sorted((ROOT / room).rglob("*.py")))]
    return {
        ".".join(f.relative_to(ROOT).with_suffix("").parts)
        .removesuffix("__init__")
        .removesuffix("."): f
        for f in files
    }


MODULES = _modules()
SCRIPTS = sorted((ROOT / "bench").rglob("*.py"))


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def _in(module: str, rooms: tuple[str, ...] | set[str]) -> bool:
    return any(module == room or (room and module.startswith(room + ".")) for room in rooms)


def _imports(module: str, nodes: list[ast.stmt] | None = None) -> set[str]:
    """What a module imports, at any depth of its code: names below `nibble` as in MODULES, others as "torch"."""
    package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part]
    found = set()
    for node in nodes if nodes is not None else list(ast.walk(_tree(MODULES[module]))):
        if isinstance(node, ast.Import):
            found |= {_below_nibble(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = package[: len(package) - node.level + 1]
                base = ".".join(["nibble", *home, *([base] if base else [])])
            base = _below_nibble(base)
            inner = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name if name in MODULES else base for name in inner}
    return found


def _below_nibble(name: str) -> str:
    if name == "nibble" or name.startswith("nibble."):
        return name[len("nibble.") :]
    return "<" + name.split(".")[0] + ">"  # outside


def _own(imports: set[str]) -> set[str]:
    return {name for name in imports if not name.startswith("<")}


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] in MAY_IMPORT])
def test_imports_go_one_way(module: str) -> None:
    allowed = MAY_IMPORT[module.split(".")[0]] | EVERYBODY
    wrong = {name for name in _own(_imports(module)) - {""} if not _in(name, allowed)}
    if module.split(".")[0] in ("kernels", "engine"):
        wrong |= {name for name in _own(_imports(module)) if _in(name, CONVERSION)}
    assert not wrong, f"{module} must not import {sorted(wrong)}"


def _import_time_graph() -> dict[str, set[str]]:
    """Which module imports which when it is imported; imports inside functions and TYPE_CHECKING do not run then."""
    return {
        m: _own(_imports(m, list(_import_time(_tree(MODULES[m]).body)))) - {m, ""} for m in MODULES
    }


def _reached(module: str, graph: dict[str, set[str]]) -> dict[str, str]:
    """Everything that importing a module imports -> who imports it."""
    found = {module: ""}
    queue = [module]
    while queue:
        importer = queue.pop()
        for name in graph.get(importer, set()) - set(found):
            found[name] = importer
            queue.append(name)
    return found


def test_serving_loads_nothing_of_the_conversion_side() -> None:
    graph = _import_time_graph()
    needs_no_calibration = set(_reached("quant.algorithms.data_free", graph))
    assert not needs_no_calibration & set(CALIBRATED)
    for module in MODULES:
        if _in(module, {"kernels", "engine", "server"}):
            found = _reached(module, graph)
            wrong = [n for n in found if _in(n, CONVERSION) and n not in needs_no_calibration]
            assert not wrong, f"{module} loads {wrong[0]}, through {found[wrong[0]]}"


def test_no_import_cycles() -> None:
    graph = _import_time_graph()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "import cycle: " + " -> ".join(
            [*path[path.index(module) :], module]
        )
        if module not in done:
            for name in sorted(graph.get(module, ())):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def _import_time(body: list[ast.stmt]):
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _import_time(node.body)


def test_server_names_no_torch() -> None:
    for module in MODULES:
        if _in(module, {"server"}):
            assert "<torch>" not in _imports(module), module


def test_package_imports_are_relative() -> None:
    for module, file in MODULES.items():
        if not _in(module, {"tools"}):
            absolute = [
                n
                for n in ast.walk(_tree(file))
                if isinstance(n, ast.ImportFrom)
                and not n.level
                and (n.module or "").split(".")[0] == "nibble"
            ]
            assert not absolute, (
                f"{module}, line {absolute[0].lineno}: import relatively inside the package"
            )


@pytest.mark.parametrize(
    "file", [*MODULES.values(), *SCRIPTS], ids=lambda f: str(f.relative_to(ROOT))
)
def test_forbidden_calls(file: Path) -> None:
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(_tree(file)):
        where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {a.name for a in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "dill", "marshal", "shelve", "joblib"}, (
                f"{where}: no pickle"
            )
            if getattr(node, "module", None) == "os" and module not in READS_ENVIRONMENT:
                assert not names & {"environ", "getenv"}, (
                    f"{where}: only `nibble serve` and the config read the environment"
                )
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            assert module in READS_ENVIRONMENT, (
                f"{where}: only `nibble serve` and the config read the environment"
            )
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load"), f"{where}: no {called}"
            assert not any(k.arg == "trust_remote_code" for k in node.keywords), (
                f"{where}: no trust_remote_code"
            )


@pytest.mark.parametrize(
    "file", [*MODULES.values(), *SCRIPTS], ids=lambda f: str(f.relative_to(ROOT))
)
def test_file_and_function_length(file: Path) -> None:
    name, lines = str(file.relative_to(ROOT)), len(file.read_text().splitlines())
    assert lines <= MAX_FILE_LINES or name in LONG_FILES, f"{name} has {lines} lines: split it"
    long = {
        node.name: lines
        for node in ast.walk(_tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := _body_lines(node)) > MAX_BODY_LINES
    }
    wrong = {n: count for n, count in long.items() if n not in LONG_FUNCTIONS.get(name, ())}
    assert not wrong, f"{name}: {wrong} lines of body, more than {MAX_BODY_LINES}: split them"


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From the first statement after the docstring to the end; a nested function counts for both."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_exceptions_are_needed() -> None:
    for name in LONG_FILES:
        assert len((ROOT / name).read_text().splitlines()) > MAX_FILE_LINES, name
    for name, functions in LONG_FUNCTIONS.items():
        nodes = [n for n in ast.walk(_tree(ROOT / name)) if isinstance(n, ast.FunctionDef)]
        long = {n.name for n in nodes if _body_lines(n) > MAX_BODY_LINES}
        assert functions <= long, f"{name}: {functions - long} are short enough"


def test_every_module_says_what_it_is() -> None:
    bare = [m for m, f in MODULES.items() if _tree(f).body and not ast.get_docstring(_tree(f))]
    assert not bare, f"no module docstring: {bare}"


def test_every_package_is_installed() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    present = {f"nibble.{m}".rstrip(".") for m, f in MODULES.items() if f.name == "__init__.py"}
    assert present == listed


def _functions(file: Path) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function, and whether it is a kernel (or runs when one is compiled): code that Triton compiles."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, any(ast.unparse(d).startswith("triton.") for d in node.decorator_list)


def test_only_kernels_are_untyped() -> None:
    """mypy is lenient in modules with kernels: what else is in them has its types all the same."""
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    lenient = set(mypy["overrides"][0]["module"])
    assert lenient == {
        f"nibble.{m}" for m, f in MODULES.items() if any(kernel for _, kernel in _functions(f))
    }
    for module in lenient:
        for node, kernel in _functions(MODULES[module.removeprefix("nibble.")]):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            given += [each for each in (node.args.vararg, node.args.kwarg) if each]
            bare = [each.arg for each in given if each.annotation is None]
            assert kernel or (node.returns and not bare), f"{module}.{node.name}: {bare}"


def test_every_dependency_is_imported() -> None:
    """At run time, by name; what only tests and benchmarks need is the dev extra's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {re.split(r"[<>=;\[ ]", line)[0].replace("-", "_") for line in project["dependencies"]}
    listed = {{"pillow": "PIL"}.get(name, name) for name in listed}
    imported = {
        name[1:-1] for module in MODULES for name in _imports(module) if name.startswith("<")
    }
    assert listed <= imported, f"no file imports {sorted(listed - imported)}"


def _run(code: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        check=False,
        env={"PATH": "", "HOME": str(cwd), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_importing_needs_no_gpu_compiler_or_network(tmp_path: Path) -> None:
    names = [f"nibble.{m}".rstrip(".") for m in MODULES]
    _run(
        f"""
import importlib, socket
def refuse(*args, **kwargs):
    raise RuntimeError("network used while importing")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
for name in {names!r}:
    importlib.import_module(name)
import torch
if torch.cuda.is_initialized():
    raise RuntimeError("importing touched the GPU")
""",
        tmp_path,
    )


def test_the_server_process_loads_no_torch(tmp_path: Path) -> None:
    names = [
        f"nibble.{m}".rstrip(".")
        for m in MODULES
        if m in TORCH_FREE or _in(m, {"server", "engine.text"})
    ]
    _run(
        f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    if "torch" in sys.modules:
        raise RuntimeError(f"importing {{name}} loads torch")
""",
        tmp_path,
    )


DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("doc", DOCS, ids=lambda f: f.name)
def test_links_in_the_docs_exist(doc: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", doc.read_text())
    missing = [link for link in links if not (doc.parent / link).exists()]
    assert not missing, f"{doc.name} links to {missing}"


def test_architecture_page_names_what_exists() -> None:
    """`file.py::function` or `file.py::Class.method` in the page must be defined; every module must be named."""
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    for name, target in re.findall(r"`([\w/]+\.py)::([\w.]+)`", text):
        assert (ROOT / name).exists(), f"{name} does not exist"
        assert target in _defined(_tree(ROOT / name).body), f"{name} defines no {target}"
    named = set(re.findall(r"`((?:[\w]+/)*\w+\.py)", text))
    missing = [
        str(f.relative_to(ROOT))
        for f in MODULES.values()
        if f.name != "__init__.py" and str(f.relative_to(ROOT)) not in named
    ]
    assert not missing, f"docs/ARCHITECTURE.md has no line for {missing}"


def _defined(body: list[ast.stmt], prefix: str = "") -> set[str]:
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= _defined(node.body, f"{prefix}{node.name}.")
    return found
