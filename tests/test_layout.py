"""The house rules: who may import whom, what importing the package costs, what tracked files may say."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_treeflash"
# The root holds what a Hub repository carries, and what is the package's own: its front door and its command line.
FRONT = {"__init__", "__main__"}
CORE = {path.stem for path in PACKAGE.glob("*.py")} - FRONT
PARTS = {
    "attention",
    "cache",
    "choice",
    "compat",
    "hybrids",
    "kernel_attention",
    "layers",
    "logits_process",
    "memory",
    "protocols",
    "rows",
    "states",
    "storage",
    "taps",
    "transitions",
    "tree",
    "verify",
}
CORE_LIBRARIES = {"numpy", "torch", "transformers", "huggingface_hub", "safetensors"}
OPTIONAL = {"triton", "peft", "datasets", "matplotlib", "typer", "rich"}
# From each folder, where its modules may reach besides their neighbours; "" is the root.
REACH = {
    "": set(),
    "kernels": set(),
    "recurrent": {"", "kernels"},
    "static": {"", "kernels"},
    "bench": {""},
    "tracing": {"", "bench"},
    "training": {"", "bench"},
    "hub": {"", "bench"},
    "cli": {"", "bench", "hub", "tracing", "training"},
}
FRONT_DOORS = {"", "__main__"}


def imports(path: Path, top_level_only: bool = False):
    """Yield (level, module) of the import statements of a file; level 0 is absolute."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def name_of(path: Path) -> str:
    """Return a file's module name below the package, `""` for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Return the package's own modules that a file imports anywhere, functions included."""
    package = [*path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]).strip(".")
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "hf_treeflash":
            base = node.module.removeprefix("hf_treeflash").lstrip(".")
        else:
            continue
        for alias in node.names:
            inner = f"{base}.{alias.name}".lstrip(".")
            found.add(inner if inner in modules else base)
    return found


def modules_by_name(path: Path) -> set[str]:
    """Return the package's own modules that a file asks `importlib` for."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "importlib.import_module"]
    return {name.removeprefix("hf_treeflash.") for name in names}


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    """The package's modules, and what each imports of the others."""
    return {name: imported_modules(path, set(FILES)) for name, path in FILES.items()}


def test_what_generate_does_without_in_a_repository_is_asked_for_by_name():
    asked = {name: modules_by_name(path) for name, path in FILES.items()}
    assert {name: others for name, others in asked.items() if others} == {
        "assistants": {"checkpoints", "modeling_treeflash"},
        "compat": {"kernels"},
        "generation": {"static"},
        "hybrids": {"recurrent"},
        "kernel_attention": {"kernels.attention_interface"},
    }


def test_imports_form_no_circle(arrows):
    arrows = {name: others | modules_by_name(FILES[name]) for name, others in arrows.items()}
    done: set[str] = set()

    def follow(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(arrows[name] - {name}):
                follow(other, (*trail, name))
            done.add(name)

    for name in sorted(arrows):
        follow(name, ())


def test_no_arrow_points_back_up(arrows):
    for name, others in arrows.items():
        if name in FRONT_DOORS:
            continue
        folder = name.rpartition(".")[0] or (name if (PACKAGE / name).is_dir() else "")
        for other in others:
            there = other.rpartition(".")[0] or (other if (PACKAGE / other).is_dir() else "")
            assert other not in FRONT_DOORS, f"{name} imports the package's front door"
            assert there == folder or there in REACH[folder], f"{name} imports {other}"


@pytest.mark.parametrize("name", sorted(CORE))
def test_what_a_repository_carries_is_flat_siblings_on_torch_and_transformers(name):
    for level, module in imports(PACKAGE / f"{name}.py"):
        if level:
            assert level == 1 and module in CORE, f"{name} imports .{module}"
        else:
            root = module.split(".")[0]
            assert root in CORE_LIBRARIES or root in sys.stdlib_module_names, f"{name} imports {module}"


def test_every_module_of_the_root_is_carried_by_a_repository():
    """The listing tells what is exported: nothing stands in the root that the drafter or `generate` does not need."""
    from transformers.dynamic_module_utils import get_relative_import_files

    entries = [str(PACKAGE / f"{name}.py") for name in ("modeling_treeflash", "generation")]
    carried = {Path(file).stem for entry in entries for file in [entry, *get_relative_import_files(entry)]}
    assert carried == CORE


@pytest.mark.parametrize("name", sorted(PARTS))
def test_the_algorithms_parts_do_not_know_the_drafter(name):
    assert all(level == 0 or module in PARTS for level, module in imports(PACKAGE / f"{name}.py"))


def test_what_calls_leave_for_later_ones_is_kept_in_one_place():
    for name, path in FILES.items():
        assert name == "memory" or (0, "weakref") not in imports(path), f"{name} imports weakref"


def test_kernels_know_torch_triton_and_the_attention_registry_only():
    for path in (PACKAGE / "kernels").glob("*.py"):
        for level, module in imports(path):
            root = module.split(".")[0]
            allowed = {"torch", "triton"} | ({"transformers"} if path.stem == "attention_interface" else set())
            assert level == 1 or root in allowed or root in sys.stdlib_module_names, f"{path.name}: {module}"


def test_optional_libraries_load_when_used():
    for path in PACKAGE.rglob("*.py"):
        if path.stem in {"demo", "plots", "progress"} or path.parent.name == "cli":
            continue
        heavy = {module.split(".")[0] for level, module in imports(path, top_level_only=True) if level == 0} & OPTIONAL
        assert not heavy, f"{path.relative_to(PACKAGE)} imports {heavy} when it is imported"
    # torch imports triton by itself where it is installed, so absence is what shows that we do not need it.
    code = (
        f"import sys\nfor name in {sorted(OPTIONAL)}: sys.modules[name] = None\n"
        "import hf_treeflash, hf_treeflash.kernels\n"
        "import json; print(json.dumps([m for m in sys.modules if m.startswith('hf_treeflash.')]))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    outer = {f"hf_treeflash.{name}" for name in ("training", "hub", "bench", "cli", "static", "recurrent", "tracing")}
    assert not outer & set(json.loads(loaded))


def test_contributing_tells_where_everything_is():
    rows = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| `")]
    told = {name for row in rows for name in re.findall(r"`([\w/]+)`", row.split("|")[1])}
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")} | {"tiny/"}
    assert {name for name in told if name.count("/") == 0} == CORE | FRONT
    assert {name for name in told if name.endswith("/")} == folders
    assert all((PACKAGE / f"{name}.py").exists() for name in told if not name.endswith("/"))


def test_public_names():
    import hf_treeflash

    assert set(hf_treeflash.__all__) >= {"TreeFlashCandidateGenerator", "TreeFlashConfig", "TreeFlashDraftModel"}
    assert all(hasattr(hf_treeflash, name) for name in hf_treeflash.__all__)


def test_tracked_files_name_no_machine():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = re.compile(r"(?<![\w.-])/(?:work|farm|root)/\w")
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".json", ".toml", ".txt", ".yaml", ""} and path.is_file():
            assert not paths.search(path.read_text(errors="ignore")), name
