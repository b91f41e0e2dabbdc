"""Which module may import which: dependencies point from scripts to tracks to what both tracks share."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "compression").rglob("*.py"))
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
# They compute with tensors, and know nothing of disks, trainers or command lines.
PURE = {f"compression.{name}" for name in ("structures", "importance", "schedule", "allocation")}
OUTSIDE = {"accelerate", "argparse", "os", "pathlib", "shutil", "tyro"} | {
    f"compression.{name}"
    for name in ("assets", "checkpoint", "config", "files", "integrity", "outputs", "training", "text_files")
}


def imports_of(path):
    """The modules that a file imports, wherever in it; of `from package import name` the name too where it is one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if not name.startswith("compression") or name in MODULES}


def track_of(module):
    """classifier, llm, or None where both tracks share it."""
    track = module.split(".")[1:2]
    return track[0] if track and track[0] in ("classifier", "llm") else None


@pytest.mark.parametrize("module", MODULES)
def test_dependencies_point_one_way(module):
    for imported in imports_of(MODULES[module]):
        assert imported.split(".")[0] not in SCRIPTS, f"{module} imports the script {imported}"
        allowed = {None} if track_of(module) is None else {None, track_of(module)}
        assert track_of(imported) in allowed, f"{module} imports {imported} of another track"
        if module in PURE:
            assert imported not in OUTSIDE, f"{module} imports {imported}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("compression.modeling.")])
def test_what_travels_in_checkpoints_needs_torch_and_transformers_alone(module):
    known = {"torch", "transformers"} | set(sys.stdlib_module_names)
    foreign = {name for name in imports_of(MODULES[module]) if name.split(".")[0] not in known}
    assert not foreign, f"{module} imports {', '.join(sorted(foreign))}"
