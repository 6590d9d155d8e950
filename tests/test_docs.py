"""The documents are true: links, paths, names, command lines and tables in them match the repository."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from paca_lightning import PaCAError
from paca_lightning.cli import main
from paca_lightning.tools.run_config import RunCLI, lightning_cli
from tests.test_layering import MAY_IMPORT

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(p for f in ("docs", "configs", "callbacks") for p in (ROOT / f).rglob("*.md")))
)
SETTINGS = sorted(path for folder in ("configs", "callbacks") for path in (ROOT / folder).rglob("*.yaml"))
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
TOP_FOLDERS = {"paca_lightning", "tests", "configs", "callbacks", "docs", "scripts", "constraints", ".ci"}
RUNS = ("fit", "validate", "test", "predict")
BASE = "configs/debug.yaml"
"""Stands for a user's own config in command lines."""


def ids(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def text_of(path: Path) -> str:
    """A document, or the header of a YAML file without its comment signs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    lines = text.splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


def prose_of(text: str) -> str:
    """A document without its fenced code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


# ---- links, paths, names


def anchors_of(text: str) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path, text: str) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(text)):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors_of(text_of(target))):
            broken.append(link)
    return broken


def missing_paths(text: str) -> list[str]:
    """Paths in the repository or in the package that are named and do not exist. Capital letters are placeholders."""
    missing = []
    for token in re.findall(r"(?<![\w/.:~-])\.?\w[\w.*-]*/[\w./*-]*", text):
        pattern = re.sub(r"\b[A-Z]+\b", "*", token.rstrip("./"))
        if token.split("/")[0] not in TOP_FOLDERS | set(MAY_IMPORT):
            continue
        places = (pattern, f"paca_lightning/{pattern}", f"paca_lightning/{pattern}.py")
        if not any(next(ROOT.glob(place), None) for place in places):
            missing.append(token)
    return missing


def missing_names(text: str) -> list[str]:
    """Dotted names of the package that do not import, and names of tests that do not exist."""
    missing = []
    for name in set(re.findall(r"\bpaca_lightning(?:\.\w+)+", text)) - {"paca_lightning.json"}:
        owner, _, attribute = name.rpartition(".")
        if not hasattr(importlib.import_module(owner), attribute):
            try:
                importlib.import_module(name)
            except ImportError:
                missing.append(name)
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    return missing + [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in sources]


@pytest.mark.parametrize("path", DOCUMENTS + SETTINGS, ids=ids(DOCUMENTS + SETTINGS))
def test_what_a_document_names_exists(path: Path) -> None:
    text = text_of(path)
    assert broken_links(path, text) == []
    assert missing_paths(text) == []
    assert missing_names(text) == []


def test_what_does_not_exist_is_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    text = "# A head\n[a](#a-head) [b](#b) [c](gone.md)\n`docs/gone.md` `tasks/loss` docs/*.md"
    text += "\npaca_lightning.gone `test_gone`"
    document.write_text(text)
    assert broken_links(document, text) == ["#b", "gone.md"]
    assert missing_paths(text) == ["docs/gone.md"]
    assert missing_names(text) == ["paca_lightning.gone", "test_gone"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids(DOCUMENTS))
def test_python_examples_parse_and_import_what_there_is(path: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", text_of(path), flags=re.S | re.M):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paca_lightning"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


# ---- command lines


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each ``paca-lightning``, ``python`` and ``make`` command in code, or at the start of a line."""
    joined = re.sub(r"\\\n\s*", "", text)
    spans = re.findall(r"`((?:paca-lightning|python|make) [^`\n]+)`", joined)
    lines = re.findall(r"^(?:run +|full +)?((?:paca-lightning|python|make) .*)$", joined.replace("\n    ", "\n"), re.M)
    for line in spans + lines:
        command = re.split(r"\s+#|\s{2,}", line)[0]
        yield shlex.split(command.replace("`", ""))


class ParseOnly(RunCLI):
    """Builds the parser of LightningCLI's subcommands and runs nothing."""

    def instantiate_classes(self) -> None:
        """Leave everything unbuilt."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Leave it."""

    def _set_seed(self) -> None:
        """Leave the global random state alone."""


@cache
def parser_of_runs() -> ParseOnly:
    return lightning_cli(["fit", "--config", BASE], run=True, cli_class=ParseOnly)  # type: ignore[return-value]


def after(words: list[str]) -> Iterator[tuple[str, str]]:
    """Each word with the one before it."""
    return pairwise(["", *words])


def check_run(words: list[str]) -> None:
    """Exit with an error unless LightningCLI knows the options and their types, and the files of --config exist."""
    mine = re.compile(r"(configs/)?FILE|yours\.yaml")
    words = [BASE if before == "--config" and mine.fullmatch(word) else word for before, word in after(words)]
    if "--config" not in words:
        words = [*words[:1], "--config", BASE, *words[1:]]
    parser_of_runs().parser.parse_args(words)


def options_in_help(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--[\w-]+", capsys.readouterr().out))


def check_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert arguments[0] in targets
    elif program == "python":
        if arguments[0] == "train.py":  # a user's project
            check_run(arguments[1:])
        elif arguments[0].startswith("scripts/"):
            assert (ROOT / arguments[0]).is_file()
    elif arguments[0] in RUNS:
        check_run(without(arguments, {"--lr"}))  # --lr auto is fit's own, before LightningCLI
    elif not arguments[0].startswith("-"):
        own = options_in_help(arguments[0], capsys)
        given = {word.partition("=")[0] for word in arguments[1:] if word.startswith("--")}
        of_files = arguments[0] == "data" and "--config" not in arguments
        if arguments[0] in ("data", "estimate") and not of_files:  # take what fit takes, too
            assert given - own <= {word for word in given if re.match(r"--(config|trainer|model|data)\b", word)}
            check_run(["fit", *without(arguments[1:], own - {"--config"})])
        else:
            assert given <= own


def without(words: list[str], options: set[str]) -> list[str]:
    """Words without some options and their values."""
    return [word for before, word in after(words) if word not in options and before not in options]


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCUMENTS + SETTINGS, ids=ids(DOCUMENTS + SETTINGS))
def test_command_lines_are_understood(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["paca-lightning"])
    for words in command_lines(text_of(path)):
        try:
            check_command(words, capsys)
        except (SystemExit, AssertionError) as error:
            raise AssertionError(f"{shlex.join(words)}\n{capsys.readouterr().err[-300:]}") from error


@pytest.mark.parametrize("path", SETTINGS, ids=ids(SETTINGS))
def test_options_in_a_header_are_known(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["paca-lightning"])
    base = [] if path.is_relative_to(ROOT / "configs") else ["--config", BASE]
    text = text_of(path).replace("\n", " ")
    options = re.findall(r"(--(?:trainer|model|data)\.[\w.]+)[= ](\[[^]]*\]|[^\s;]+)", text)
    check_run(["fit", *base, "--config", str(path), *(f"{name}={value}" for name, value in options)])


def test_a_wrong_command_line_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["paca-lightning"])
    text = """`paca-lightning fit --config configs/gone.yaml`, `paca-lightning test --trainer.devicez 2`
    paca-lightning generate --modell x \\
        --prompts y
    make coffee
    python scripts/gone.py
    run      paca-lightning data --config configs/debug.yaml --sampels 3     (a remark)
    paca-lightning estimate --config FILE --model.init_args.modell x"""
    commands = list(command_lines(text))
    assert len(commands) == 7
    for words in commands:
        with pytest.raises((SystemExit, AssertionError, PaCAError)):
            check_command(words, capsys)


# ---- tables


def test_the_table_of_folders_is_the_layering() -> None:
    folders = {folder for folder in MAY_IMPORT if (ROOT / "paca_lightning" / folder).is_dir()}
    found = {}
    for line in (ROOT / "docs" / "design.md").read_text(encoding="utf-8").splitlines():
        if row := re.match(r"\| `(\w+)/` \|.*\| ([^|]*) \|$", line):
            folder, imports = row.groups()
            found[folder] = folders - {folder} if imports == "all below" else set(re.findall(r"`(\w+)`", imports))
    assert found == {folder: MAY_IMPORT[folder] for folder in folders}


def test_the_contract_is_short() -> None:
    assert len((ROOT / "docs" / "design.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_each_decision_has_a_number_a_row_in_the_index_and_one_page() -> None:
    index = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    assert len({path.name[:4] for path in DECISIONS}) == len(DECISIONS) > 0
    for path in DECISIONS:
        text = path.read_text(encoding="utf-8")
        assert index.count(f"| [{path.name[:4]}]({path.name}) |") == 1
        assert text.startswith(f"# {path.name[:4]}: ")
        assert len(text.splitlines()) <= 75
