"""Dependencies point one way: read from the imports of every file."""

import ast
import sys
from pathlib import Path

import pytest
from scripts import ROOT

SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "compression").rglob("*.py")
}
TRACKS = ("compression.classifier", "compression.llm", "compression.export", "compression.study")
PAGE = "compression.page"
PURE = ("compression.structures", "compression.importance", "compression.schedule", "compression.allocation")
# Disks, trainers and command lines.
WORLD = [f"compression.{name}" for name in ("files", "outputs", "integrity", "stage_record", "inputs")]
WORLD += ["compression.checkpoint", "compression.training", "compression.config", "tyro", "accelerate"]


def imports_of(path: Path, module: str = "") -> set[str]:
    """Full names of all that a file imports anywhere in it, `from a import b` as a.b."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outer = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*outer, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def forbidden(module: str, name: str) -> bool:
    """Whether the layout forbids a module of the package to import a name."""
    if inside(name, *SCRIPTS, "tests", "benchmarks"):
        return True
    if inside(module, "compression.modeling") and module != "compression.modeling":
        return not inside(name, "torch", "transformers", *sys.stdlib_module_names)
    if inside(module, *PURE) and inside(name, *WORLD):
        return True
    if inside(module, PAGE) or inside(name, PAGE):  # it shows what all of them wrote
        return not inside(module, PAGE)
    others = [track for track in TRACKS if not inside(module, track)]
    return inside(name, *others) and module != "compression"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_lies_below_it(module):
    bad = sorted(name for name in imports_of(MODULES[module], module) if forbidden(module, name))
    assert not bad, f"{module} must not import {', '.join(bad)}"


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_imports_no_other_and_can_be_interrupted_from_its_first_import_on(script):
    path = ROOT / f"{script}.py"
    bad = sorted(name for name in imports_of(path) if inside(name, *SCRIPTS))
    assert not bad, f"{script} must not import {', '.join(bad)}"
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in nodes]
    first = next(name for name in names if not inside(name, *sys.stdlib_module_names))
    assert inside(first, "compression"), f"{script}: Ctrl-C would end in a traceback while {first} is imported"


@pytest.mark.parametrize(
    ("module", "name", "bad"),
    [
        ("compression.files", "gqa_aware_pruning.main", True),
        ("compression.classifier.stage", "compression.llm.text", True),
        ("compression.llm.run", "compression.classifier.tasks.encode", True),
        ("compression.llm.run", "compression.llm.text", False),
        ("compression.surgery", "compression.llm", True),
        ("compression.page.render", "compression.classifier.models.looks", False),
        ("compression.llm.run", "compression.page.update_page", True),
        ("compression.structures", "compression.files.write_json", True),
        ("compression.structures", "compression.runtime.UserError", False),
        ("compression.modeling.pruned_bert", "compression.structures", True),
        ("compression.modeling.pruned_bert", "numpy", True),
        ("compression.modeling.pruned_bert", "transformers.models.bert.modeling_bert.BertLayer", False),
        ("compression.modeling.pruned_bert", "collections.abc.Callable", False),
    ],
)
def test_the_rule_tells_good_from_bad(module, name, bad):
    assert forbidden(module, name) == bad
