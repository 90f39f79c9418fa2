"""Imports point down, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Each package may import itself and what stands before it.
FLOORS = [
    ("l4tool.core",),
    ("l4tool.hub",),
    ("converters",),
    ("batch.requests",),
    ("quant",),
    (
        "batch.line_models",
        "batch.schema",
        "batch.json_schemas",
        "batch.tools",
        "batch.structured",
        "batch.grammar_child",
        "batch.grammars",
        "batch.jsonl",
        "batch.chat",
        "batch.tokenizer",
        "batch.images",
        "batch.local_files",
        "batch.web_addresses",
        "batch.url_images",
        "batch.template",
        "batch.template_bounds",
        "batch.template_process",
    ),
    ("batch.kernels",),
    ("batch.model",),
    ("batch.engine",),
    ("batch.backends",),
    ("batch",),
    ("l4tool.commands",),
    ("l4tool",),
]
FRONT_SEES = (
    "l4tool.core",
    "batch.requests",
    "batch.line_models",
    "batch.schema",
    "batch.json_schemas",
    "batch.tools",
    "batch.structured",
    "batch.grammar_child",
    "batch.grammars",
    "batch.jsonl",
    "batch.chat",
    "batch.tokenizer",
    "batch.images",
    "batch.local_files",
    "batch.web_addresses",
    "batch.url_images",
    "batch.template",
    "batch.template_bounds",
    "batch.template_process",
)
OURS = ("l4tool", "converters", "quant", "batch")


def floor(module):
    for level, names in enumerate(FLOORS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return level
    raise AssertionError(f"{module} stands on no floor")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    for top in OURS:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_imports_point_down():
    wrong = []
    known = {name for name, _ in modules()}
    for module, path in modules():
        for target in imported(path):
            if target not in known or target in OURS:
                continue
            front = FLOORS[5]
            if module in front:
                allowed = any(target == name or target.startswith(name + ".") for name in FRONT_SEES)
            else:
                allowed = floor(target) <= floor(module)
            if not allowed:
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_help_does_not_import_torch():
    code = "import sys; from l4tool.main import main; main(sys.argv[1:]); assert 'torch' not in sys.modules, 'torch'"
    for arguments in (["--help"], *([name, "--help"] for name in ("quantize", "batch", "eval", "inspect", "verify"))):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "Usage: l4tool" in done.stdout
