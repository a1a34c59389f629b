"""What holds the house up: imports run downward, every module says what it gives, and no code comes from data."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import gemmary

SOURCE = Path(gemmary.__file__).parent
# From the ground up; a room's own files are ordered below.
FLOORS = [
    ["errors"],
    ["config", "presets", "hardware"],
    ["mesh", "processes", "stopping", "spread", "params", "kernels", "eight", "weights", "quantization", "adapters"],
    ["model", "text"],
    ["checkpoints", "data"],
    ["infer"],
    ["train"],
    ["plan"],
    ["gemma", "inspect", "chat"],
    ["evaluate"],
    ["serve"],
    [
        "recipe",
        "records",
        "stages",
        "teaching",
        "tuning",
        "whole",
        "plan_results",
        "plans",
        "watch",
        "report_figures",
        "report_pages",
        "report_sections",
        "evaluation_results",
        "evaluations",
        "audits",
        "comparison_results",
        "comparison",
        "report_judgements",
        "report",
        "lives",
    ],
    ["cli"],
]
ROOMS = {
    "kernels": ["library", "flash", "attention", "choice", "products"],
    "model": ["rope", "attention", "cache", "pages", "transformer"],
    "text": ["vocabulary", "writers", "tokenizer", "answers", "dialogue", "training"],
    "checkpoints": [
        "names", "checkpoint", "manifest", "safetensors_file", "gguf_header", "gguf_file", "torch_file", "orbax_file", "native", "huggingface",
        "peft", "gguf", "google", "adapted", "convert", "open",
    ],
    "data": [
        "words", "language", "filters", "privacy", "readers", "arithmetic", "standard_library", "sources", "classifiers",
        "decontamination", "duplicates", "recitation", "curation_settings", "curation_report", "curation_steps", "executors",
        "curate", "library_facts", "lessons", "conversations", "instructions", "tokens", "packing", "turns", "mixture", "batches",
    ],
    "infer": ["sampling", "session", "engine", "scoring", "speculation", "memory", "steps", "drafting", "waiting", "batching"],
    "train": [
        "memory", "flops", "head", "sharded_loss", "losses", "optimizer", "step", "meshed", "objectives", "held_out", "journal", "parts", "model_files", "saving", "goodput",
        "pace",
        "watchdog", "traces", "endurance", "loop", "run", "pretrain", "finetune",
        "sft", "reward", "rollouts", "rewards", "watching", "rlhf", "dpo",
    ],
    "plan": [
        "program_text", "program_loops", "program", "program_memory", "program_costs", "program_groups", "program_collectives",
        "job", "serving", "network", "roofline", "arithmetic", "lowering", "budget", "planned", "search", "saved",
    ],
    "evaluate": ["harness", "isolation", "assertions", "calling", "programs", "sandbox", "code_eval", "tasks", "drawing", "memorization",
        "published", "suites", "kept", "data_sets", "toxicity", "answering", "lm_eval", "several", "running", "held_out", "examination",
        "questions", "speakers", "side_by_side", "judge", "pairs", "ratings",
    ],
    "serve": [
        "protocol", "settings", "metrics", "guards", "connection", "pages", "rate", "grammar", "replies", "asking", "completions", "app", "run", "door",
    ],
}  # fmt: skip
# Doors of the package and of its rooms: they gather names and have no place of their own.
GATHERING = {
    "gemmary",
    "gemmary.kernels",
    "gemmary.model",
    "gemmary.text",
    "gemmary.checkpoints",
    "gemmary.infer",
    "gemmary.data",
    "gemmary.train",
    "gemmary.plan",
    "gemmary.evaluate",
    "gemmary.serve",
}


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _place(module: str) -> tuple[int, int, int]:
    """(floor, room's place on it, file's place in the room)."""
    _, room, *rest = module.split(".")
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    return floor, FLOORS[floor].index(room), ROOMS[room].index(rest[0]) if rest else len(ROOMS.get(room, ()))


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gemmary":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "gemmary"}
    return found


@pytest.mark.parametrize("module", sorted(set(MODULES) - GATHERING))
def test_imports_run_downward(module: str) -> None:
    for other in _imports(MODULES[module]):
        if other == "gemmary":
            assert module == "gemmary.cli"
            continue
        assert _place(other) < _place(module), f"{module} imports {other}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_gives(module: str) -> None:
    loaded = importlib.import_module(module)
    assert loaded.__doc__
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    if module in GATHERING:
        public = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert set(getattr(loaded, "__all__", ())) - {"__version__"} == public
        return
    defined = {node.name: node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")}
    assert set(defined) <= {*loaded.__all__, *_verbs(tree)}, module
    for name in loaded.__all__:
        assert hasattr(loaded, name)
    for name, node in defined.items():
        assert ast.get_docstring(node), f"{module}.{name} has no docstring"


def _verbs(tree: ast.Module) -> set[str]:
    """Functions that a decorator registers: the door's."""
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list}


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "subprocess", "torch"}
# Generated code runs in a process of its own, behind namespaces and limits; this is the one module that starts it.
SUBPROCESS = {"gemmary.evaluate.isolation"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "Popen", "import_module"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_code_comes_from_data(module: str) -> None:
    allowed = {"subprocess", "Popen"} if module in SUBPROCESS else set()
    forbidden = FORBIDDEN_MODULES - allowed
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & forbidden
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in forbidden
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            method = name == "compile" and isinstance(node.func, ast.Attribute)  # re.compile, and XLA's
            assert name not in FORBIDDEN_CALLS - allowed or method, f"{module} calls {name}"
            said = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            assert not said.get("trust_remote_code")
            assert not said.get("allow_pickle")
            assert not said.get("shell")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_and_functions_stay_small(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 320
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 60, node.name
