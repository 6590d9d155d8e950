"""Every YAML under configs/ and callbacks/ is found, counted, and built."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
HEADER = ("needs", "run", "expect", "data")


def test_none_is_overlooked() -> None:
    assert [path.name for path in CONFIGS] == ["debug.yaml", "mmlu-smollm2.yaml", "quickstart.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_header_tells_what_it_is(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    for word in HEADER:
        assert any(line.startswith(f"#   {word} ") for line in header), f"{path.name} does not say: {word}"
    assert f"--config {path.relative_to(ROOT)}" in "\n".join(header)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_builds_a_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paca_lightning.cli import _lightning_cli

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["paca-lightning"])
    cli = _lightning_cli(["--config", str(path)], run=False)
    named = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert type(cli.model).__name__ == named["model"]["class_path"].rpartition(".")[2]
    assert type(cli.datamodule).__name__ == named["data"]["class_path"].rpartition(".")[2]
    callbacks = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert callbacks >= {entry["class_path"].rpartition(".")[2] for entry in named["trainer"]["callbacks"]}
