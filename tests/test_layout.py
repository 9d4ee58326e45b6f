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
# Flat siblings a Hub repository carries; they import torch, transformers and each other.
CORE = {
    "attention",
    "budget",
    "cache",
    "candidate_generator",
    "checkpoints",
    "configuration_treeflash",
    "context",
    "draft_head",
    "generation",
    "head_rows",
    "layers",
    "logits_process",
    "lookahead",
    "lookup",
    "memory",
    "modeling_treeflash",
    "outputs",
    "rows",
    "sequences",
    "storage",
    "tree",
    "validation",
    "verify",
}
PARTS = {"attention", "cache", "head_rows", "layers", "logits_process", "memory", "rows", "storage", "tree", "verify"}
CORE_LIBRARIES = {"numpy", "torch", "transformers", "huggingface_hub", "safetensors"}
OPTIONAL = {"triton", "peft", "datasets", "matplotlib", "typer", "rich"}


def imports(path: Path, top_level_only: bool = False):
    """Yield (level, module) of the import statements of a file; level 0 is absolute."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("name", sorted(CORE))
def test_core_files_are_flat_siblings_on_torch_and_transformers(name):
    for level, module in imports(PACKAGE / f"{name}.py"):
        if level:
            assert level == 1 and module in CORE, f"{name} imports .{module}"
        else:
            root = module.split(".")[0]
            assert root in CORE_LIBRARIES or root in sys.stdlib_module_names, f"{name} imports {module}"


@pytest.mark.parametrize("name", sorted(PARTS))
def test_the_algorithms_parts_do_not_know_the_drafter(name):
    assert all(level == 0 or module in PARTS for level, module in imports(PACKAGE / f"{name}.py"))


def test_nothing_outside_imports_the_outer_ring():
    for path in [*PACKAGE.glob("*.py"), *(PACKAGE / "kernels").glob("*.py")]:
        if path.stem in CORE or path.parent.name == "kernels":
            assert not {module for _, module in imports(path)} & {"training", "hub", "cli", "demo", "benchmark"}


def test_kernels_know_torch_triton_and_the_attention_registry_only():
    for path in (PACKAGE / "kernels").glob("*.py"):
        for level, module in imports(path):
            root = module.split(".")[0]
            allowed = {"torch", "triton"} | ({"transformers"} if path.stem == "attention_interface" else set())
            assert level == 1 or root in allowed or root in sys.stdlib_module_names, f"{path.name}: {module}"


def test_static_stands_on_the_core_and_the_kernels():
    for path in (PACKAGE / "static").glob("*.py"):
        for level, module in imports(path):
            root = module.split(".")[0]
            if level == 1:
                assert (PACKAGE / "static" / f"{root}.py").exists()
            elif level == 2:
                assert root in CORE | {"kernels"}, f"{path.name}: {module}"
            else:
                assert root in {"torch", "transformers"} or root in sys.stdlib_module_names, f"{path.name}: {module}"


def test_optional_libraries_load_when_used():
    for path in PACKAGE.rglob("*.py"):
        if path.stem in {"cli", "demo"}:
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
    outer = {f"hf_treeflash.{name}" for name in ("training", "hub", "cli", "demo", "benchmark", "static")}
    assert not outer & set(json.loads(loaded))


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
