"""What docs/security.md promises of the whole package, read off its source, and of paths that artefacts name."""

import ast
import json
from pathlib import Path

import pytest

from paca_lightning import PaCAError
from paca_lightning.strategies.fsdp2.rows import RowReader
from tests.tiny import tiny_model_directory

ROOT = Path(__file__).parents[1] / "paca_lightning"
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}
# The parent of a benchmark's processes reads what they wrote a moment before into a directory of its own.
OWN_PROCESSES = {"tools/bench/processes.py"}
UNSAFE = {"pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_is_unpickled_and_yaml_is_safe() -> None:
    for module, tree in TREES.items():
        for name, call in calls(tree):
            assert name not in UNSAFE | {"eval", "exec"}, f"{module}:{call.lineno}"
            if name == "torch.load" and module not in OWN_PROCESSES:
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert keywords.get("weights_only") == "True", f"{module}:{call.lineno}"


def test_trust_remote_code_is_off_unless_the_user_turns_it_on() -> None:
    seen = 0
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                both = [*node.args.posonlyargs, *node.args.args]
                defaults = dict(zip(reversed([a.arg for a in both]), reversed(node.args.defaults), strict=False))
                defaults |= {a.arg: d for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d}
                if "trust_remote_code" in defaults:
                    assert ast.unparse(defaults["trust_remote_code"]) == "False", f"{module}:{node.lineno}"
                    seen += 1
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) != "True", f"{module}:{node.value.lineno}"
    assert seen > 5


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/dev/zero", "sub/model.safetensors", "..", "", 3])
def test_an_index_of_weights_names_files_beside_it_alone(tmp_path: Path, file: object) -> None:
    directory = tiny_model_directory(tmp_path / "model")
    index = {"weight_map": {"lm_head.weight": file}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PaCAError, match=r"says that 'lm_head\.weight' lies in .*, which is no file beside it"):
        RowReader(directory)
