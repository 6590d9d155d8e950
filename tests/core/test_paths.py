"""Which names are paths of this machine, and that a missing one is told without asking the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paca_lightning import PaCAError
from paca_lightning.core.paths import looks_local
from paca_lightning.tasks.data.records import Source
from paca_lightning.tasks.data.tokenizer import load_tokenizer
from paca_lightning.tasks.mmlu.sources import read_split
from paca_lightning.tasks.pretrained import build_causal_lm
from paca_lightning.tools.bench.workload import Workload


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("models/SmolLM2-135M-Instruct", True),
        ("configs/tiny-llama", True),
        ("./x", True),
        ("../x", True),
        ("/x", True),
        ("~/x", True),
        ("a/b/c", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", False),
        ("gpt2", False),
        ("models", False),
    ],
)
def test_names_that_look_local(name: str, local: bool) -> None:
    assert looks_local(name) == local


@pytest.mark.parametrize("name", ["models/nowhere", "./nowhere", "/nowhere"])
@pytest.mark.parametrize(
    "use",
    [
        build_causal_lm,
        load_tokenizer,
        lambda name: list(Source(name).rows()),
        lambda name: read_split(name, "test"),
        lambda name: Workload(model=name),
    ],
    ids=["model", "tokenizer", "data", "mmlu", "bench"],
)
def test_a_missing_path_is_told_without_asking_the_hub(
    use: Callable[[str], Any], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", no_network)
    sought = str(tmp_path / name) if name.startswith("models") else "nowhere"
    with pytest.raises(PaCAError, match=rf"(does not exist|no such file) \(looked for .*{sought}"):
        use(name)
