"""Imports go one way, and the packages that only some parts may need stay with them."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "piccolo_jax"

# Each layer may import those before it, and modules of its own layer that don't import it.
LAYERS = (
    ("errors", "types", "locks"),
    ("config",),
    ("data",),
    ("sharding",),
    ("ops", "models"),
    ("losses",),
    ("tasks",),
    ("optim", "averaging"),
    ("build", "train_step"),
    ("evaluation", "checkpoint", "runs", "distributed", "metrics", "cli", "quantize"),
    ("encoder",),
    ("planning", "mining", "synthesis"),
    ("exporting",),
    ("verifying",),
    ("export",),
    (
        "train",
        "embed",
        "evaluate",
        "merge",
        "mine",
        "prepare",
        "verify",
        "plan",
        "synthesize",
        "publish",
    ),
)
COMMANDS = LAYERS[-1]
PURE = (
    "losses",
    "ops",
    "models.bert",
    "models.embedder",
    "train_step",
    "sharding",
    "optim",
    "averaging",
)


@functools.cache
def modules():
    """Path of every module of the package, by its name below the package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(p for p in parts if p != "__init__")
        if name:
            found[name] = path
    return found


def imports(path):
    """Absolute names of everything that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = (ROOT / name.replace(".", "/")).with_suffix(".py").exists()
                is_package = (ROOT / name.replace(".", "/")).is_dir()
                yield name if is_module or is_package else node.module


def own_imports(path):
    below = (name.removeprefix(f"{PACKAGE}.") for name in imports(path))
    return {name for name in below if name in modules()}


def layer(name):
    top = name.split(".")[0]
    found = [i for i, members in enumerate(LAYERS) if top in members]
    assert found, f"{name} has no place in LAYERS: say there what may import it"
    return found[0]


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_what_lies_below_it(name):
    for imported in own_imports(modules()[name]):
        assert layer(imported) <= layer(name), f"{name} imports {imported}"


def test_no_two_modules_import_each_other():
    graph = {name: own_imports(path) for name, path in modules().items()}
    done, under_way = set(), []

    def visit(name):
        assert name not in under_way, " imports ".join((*under_way, name))
        if name in done:
            return
        under_way.append(name)
        for imported in sorted(graph.get(name, ())):
            visit(imported)
        under_way.pop()
        done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_imports_a_command(command):
    importers = [name for name, path in modules().items() if command in own_imports(path)]
    assert not importers


def everything_below(name):
    """Modules that importing `name` brings in, by what the files say."""
    graph = modules()
    found, to_do = set(), [name]
    while to_do:
        module = to_do.pop()
        if module in graph and module not in found:
            found.add(module)
            to_do += own_imports(graph[module])
    return found


NO_JAX = ("data.", "verifying.")  # what runs in workers; with another sentence-transformers


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith(NO_JAX)])
def test_what_must_do_without_jax_imports_none(name):
    for module in everything_below(name):
        tops = {imported.split(".")[0] for imported in imports(modules()[module])}
        assert not tops & {"jax", "jaxlib", "flax", "optax", "orbax", "jaxtyping"}, module


@pytest.mark.parametrize(
    "name", [m for m in modules() if any(m == p or m.startswith(f"{p}.") for p in PURE)]
)
def test_the_pure_parts_do_no_input_or_output(name):
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"open", "print", "input", "Path"}
    tops = {imported.split(".")[0] for imported in imports(modules()[name])}
    assert not tops & {"os", "pathlib", "shutil", "sys", "io", "grain", "absl", "tqdm"}


@pytest.mark.parametrize("library", ["torch", "sentence_transformers"])
def test_only_verify_imports_torch_and_its_libraries(library):
    users = [
        name
        for name, path in modules().items()
        if any(imported.split(".")[0] == library for imported in imports(path))
    ]
    assert set(users) <= {"verifying.served"}


def test_training_brings_in_neither_torch_nor_tensorflow(run_python):
    done = run_python(
        "-c",
        "import sys, piccolo_jax.data.packing, piccolo_jax.data.schedule\n"
        "print('jax' in sys.modules)\n"
        "import piccolo_jax.train, piccolo_jax.embed\n"
        "print(*{'torch', 'tensorflow', 'sentence_transformers'} & set(sys.modules))",
    )
    assert done.stdout.splitlines() == ["False", ""]
