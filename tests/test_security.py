"""What docs/security.md promises of the whole package, read off its source, and of paths that artefacts name."""

import ast
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from paca_lightning import PaCAConfig, PaCAError, apply_paca, load_adapter, save_adapter
from paca_lightning.cli import main
from paca_lightning.strategies.fsdp2.rows import RowReader
from paca_lightning.tasks.data.tokenizer import load_tokenizer
from paca_lightning.tasks.pretrained import build_causal_lm
from paca_lightning.tools.bench.workload import Workload
from paca_lightning.tools.environment import describe_environment
from paca_lightning.tools.generate import generate
from tests.test_cli import failure, output_to
from tests.tiny import tiny_llama, tiny_model_directory

ROOT = Path(__file__).parents[1] / "paca_lightning"
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}
# The parent of a benchmark's processes reads what they wrote a moment before into a directory of its own.
OWN_PROCESSES = {"tools/bench/processes.py"}
DEBUG_CONFIG = "configs/debug.yaml"
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
        for name, call in calls(tree):
            # Without a word, transformers asks at the terminal whether to run a model's code.
            if re.match(r"Auto\w+\.from_", name):
                given = {keyword.arg or ast.unparse(keyword.value) for keyword in call.keywords}
                assert given & {"trust_remote_code", "source"}, f"{module}:{call.lineno}"
    assert seen > 5


def with_code(directory: Path, model_type: str) -> Path:
    """A model whose files all name code that comes with it, which leaves a file when it runs."""
    tiny_model_directory(directory)
    (directory / "own.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\n")
    for file in ("config.json", "tokenizer_config.json"):
        classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
        auto_map = {name: ["own.Own", "own.Own"] if name == "AutoTokenizer" else "own.Own" for name in classes}
        settings = json.loads((directory / file).read_text()) | {"auto_map": auto_map, "trust_remote_code": True}
        settings |= {"model_type": model_type} if file == "config.json" else {"tokenizer_class": "Own"}
        (directory / file).write_text(json.dumps(settings))
    return directory


READERS: dict[str, Callable[[str], object]] = {
    "model": build_causal_lm,
    "random weights": lambda model: build_causal_lm(model, pretrained=False),
    "tokenizer": load_tokenizer,
    "generate": lambda model: generate(model, ["Hello"], max_new_tokens=1),
    "bench": lambda model: Workload(model=model, tokens=8).build(),
    "estimate": lambda model: main(["estimate", "--config", DEBUG_CONFIG, f"--model.model={model}"]),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_code_of_a_model_does_not_run_by_itself(
    model_type: str, reader: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether to trust code"))
    monkeypatch.chdir(ROOT.parent)
    directory = with_code(tmp_path / "model", model_type)
    with suppress(PaCAError, SystemExit):  # transformers has a class of its own for some, and refuses the others
        reader(str(directory))
    assert not (directory / "ran").exists()


def test_code_of_an_adapter_does_not_run_by_itself(tmp_path: Path) -> None:
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4))
    save_adapter(model, tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    mapping = {"base_model_class": "Own", "parent_library": "own"}
    settings |= {"auto_map": {"AutoModel": "own.Own"}, "auto_mapping": mapping, "trust_remote_code": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with suppress(PaCAError):
        load_adapter(tiny_llama(), tmp_path)
    assert not (tmp_path / "ran").exists()


SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN", "COMET_API_KEY")


def test_no_output_holds_tokens_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, f"secret-of-{name}")
    monkeypatch.chdir(ROOT.parent)
    monkeypatch.setattr("sys.argv", ["paca-lightning"])
    config = ["--config", DEBUG_CONFIG]
    main(["fit", *config, *output_to(tmp_path), "--trainer.limit_train_batches=1", "--trainer.max_epochs=1"])
    main(["data", *config, "--samples", "1"])
    main(["estimate", *config, "--json", str(tmp_path / "estimate.json")])
    (tmp_path / "environment.json").write_text(json.dumps(describe_environment()))
    failure(["fit", *config, "--trainer.precision=17"], capfd)
    said = capfd.readouterr()
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {".ckpt", ".csv", ".json", ".safetensors", ".yaml"} <= {path.suffix for path in written}
    for text in (said.out.encode(), said.err.encode(), *written.values()):
        assert b"secret-of" not in text


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/dev/zero", "sub/model.safetensors", "..", "", 3])
def test_an_index_of_weights_names_files_beside_it_alone(tmp_path: Path, file: object) -> None:
    directory = tiny_model_directory(tmp_path / "model")
    index = {"weight_map": {"lm_head.weight": file}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PaCAError, match=r"says that 'lm_head\.weight' lies in .*, which is no file beside it"):
        RowReader(directory)
