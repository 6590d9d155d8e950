"""The adapter in a checkpoint of several ranks is that of AdapterCheckpoint, bitwise, in one process without ranks."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from paca_lightning import AdapterCheckpoint, PaCAConfig, PaCAError, PaCAStrategy, load_adapter
from paca_lightning.adapters.saved import read_adapter
from paca_lightning.tools.generate import generate
from tests.adapters.test_adapter import assert_same
from tests.adapters.test_checkpoint import Saves
from tests.distributed_launch import launch
from tests.distributed_training import Run, TinyChat, make_trainer
from tests.tiny import tiny_llama, tiny_model_directory

pytestmark = pytest.mark.distributed
SIZES = {"intermediate_size": 97, "vocab_size": 383}
WITH_HEAD = PaCAConfig(r=4, alpha=8, column_steps="input_rms", modules_to_save=["lm_head"])
RUNS: dict[str, tuple[Run, bool]] = {  # and whether weights alone are saved
    "directory": (Run(steps=2, strategy={}, config=WITH_HEAD), False),
    "weights only": (Run(steps=2, strategy={}, config=PaCAConfig(r=4, quantize="nf4")), True),
    "file": (Run(steps=2, strategy={"save_distributed_checkpoint": False}), False),
}


def train_all(directory: Path) -> None:
    for name, (run, weights_only) in RUNS.items():
        place = directory / name
        saving = [Saves(place / "run.ckpt", weights_only), AdapterCheckpoint(str(place / "adapter"))]
        make_trainer(run, callbacks=[PaCAStrategy(run.config), *saving]).fit(TinyChat(**run.module))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    launch(train_all, 2, directory)
    return directory


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_of_ranks_holds_the_adapter_of_its_run_bitwise(
    name: str, runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, found = tiny_llama(**SIZES), tiny_llama(**SIZES)
    load_adapter(expected, runs / name / "adapter")
    assert caplog.text == ""
    load_adapter(found, runs / name / "run.ckpt")
    assert caplog.text == ""
    assert_same(found, expected)
    assert any(tensor.any() for key, tensor in found.state_dict().items() if key.endswith("paca_delta"))


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_of_ranks_tells_its_base_model_as_its_adapter_does(name: str, runs: Path) -> None:
    expected = read_adapter(runs / name / "adapter").settings
    found = read_adapter(runs / name / "run.ckpt").settings
    assert expected is not None
    assert found is not None
    assert found.fingerprint == expected.fingerprint
    assert found.fingerprint


@pytest.mark.parametrize("name", RUNS)
def test_it_is_refused_by_a_model_with_another_base(name: str, runs: Path) -> None:
    model, as_before = other_base(), other_base()
    with pytest.raises(PaCAError, match="it was trained on another base model: its weights differ from those here"):
        load_adapter(model, runs / name / "run.ckpt")
    assert_same(model, as_before)


def other_base() -> LlamaForCausalLM:
    """Another model of the same architecture, seed apart."""
    model = tiny_llama(**SIZES)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.copy_(0.02 * torch.randn_like(parameter))
    return model


def test_a_checkpoint_of_an_earlier_version_loads_and_one_line_says_what_is_not_verified(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Path(shutil.copytree(runs / "directory" / "run.ckpt", tmp_path / "run.ckpt"))
    content = torch.load(checkpoint / "meta.pt", weights_only=True)
    content["paca_adapter"]["fingerprint"] = None
    torch.save(content, checkpoint / "meta.pt")
    load_adapter(tiny_llama(**SIZES), checkpoint)
    assert caplog.text.count("without values of its base model") == 1


class OtherBase(TinyChat):
    """The same run on another base model."""

    def _build(self) -> LlamaForCausalLM:
        return other_base()

    val_dataloader = TinyChat.train_dataloader


def resume_on_another_base(directory: Path) -> list[str]:
    """What resuming and evaluating each checkpoint of ranks on another base model says."""
    messages = []
    for name, (run, weights_only) in RUNS.items():
        for work in ("validate",) if weights_only else ("fit", "validate"):
            module = OtherBase(**run.module)
            trainer = make_trainer(replace(run, steps=4), limit_val_batches=1)
            with pytest.raises(PaCAError) as refused:
                getattr(trainer, work)(module, ckpt_path=directory / name / "run.ckpt")
            messages.append(str(refused.value))
            assert module.losses == []  # not one step was trained
    return messages


def test_a_run_does_not_go_on_from_it_on_another_base(runs: Path) -> None:
    for messages in launch(resume_on_another_base, 2, runs):
        assert len(messages) == 5
        assert {message.partition(":")[0] for message in messages} == {
            "The checkpoint was saved by a run on another base model"
        }


def test_generate_takes_a_sharded_checkpoint(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(tiny_model_directory(tmp_path / "base", **SIZES))
    answers = []
    for adapter in ("adapter", "run.ckpt"):
        generate(base, "hi", adapter=str(runs / "directory" / adapter), max_new_tokens=8)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


# -- What is refused


def shard(directory: Path) -> Path:
    return directory / "__1_0.distcp"


def flip(directory: Path) -> None:
    """Change one bit of a shard of a delta."""
    listed = pickle.loads((directory / ".metadata").read_bytes()).storage_data
    place = next(
        place for index, place in listed.items() if index.fqn.endswith("paca_delta") and index.offset != (0, 0)
    )
    content = bytearray((directory / place.relative_path).read_bytes())
    content[place.offset + place.length // 2] ^= 1
    (directory / place.relative_path).write_bytes(content)


def listed(change: Callable[[Any, str], Any]) -> Callable[[Path], None]:
    """Edit what the list of shards tells of the first delta with two shards."""

    def edit(directory: Path) -> None:
        content = pickle.loads((directory / ".metadata").read_bytes())
        change(content, next(name for name in content.state_dict_metadata if name.endswith("q_proj.paca_delta")))
        (directory / ".metadata").write_bytes(pickle.dumps(content))

    return edit


def second(content: Any, name: str) -> Any:
    """Index and place of the second shard of a tensor."""
    return next(item for item in content.storage_data.items() if item[0].fqn == name and item[0].offset != (0, 0))


def set_offset(content: Any, name: str) -> None:
    index, place = second(content, name)
    del content.storage_data[index]
    content.storage_data[type(index)(name, (1, 0))] = place


def set_file(name: str) -> Callable[[Any, str], None]:
    return lambda content, delta: setattr(second(content, delta)[1], "relative_path", name)


def share(content: Any, name: str) -> None:
    """As if one bit of the name of a file had changed."""
    place = second(content, name)[1]
    place.relative_path, place.offset = "__0_0.distcp", 0


def forget_steps(content: Any, name: str) -> None:
    steps = name.replace("paca_delta", "paca_scale")
    content.state_dict_metadata[f"{steps}d"] = content.state_dict_metadata.pop(steps)
    content.storage_data = {
        type(index)(f"{steps}d" if index.fqn == steps else index.fqn, index.offset): place
        for index, place in content.storage_data.items()
    }


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("hostile",)


def name_code(directory: Path) -> None:
    buffer = io.BytesIO()
    pickle.dump(Hostile(), buffer)
    (directory / ".metadata").write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (flip, r"__1_0\.distcp .*paca_delta.* is not what was saved"),
        (name_code, r"\.metadata cannot be read: it names (posix|nt)\.mkdir, which has no place"),
        (lambda path: (path / ".metadata").unlink(), r"\.metadata cannot be read"),
        (lambda path: (path / ".metadata").write_bytes(b"no pickle"), r"\.metadata cannot be read"),
        (lambda path: (path / "meta.pt").write_bytes(b""), r"meta\.pt is cut off"),
        (lambda path: shard(path).unlink(), r"cannot be read: .*__1_0\.distcp"),
        (lambda path: shard(path).write_bytes(shard(path).read_bytes()[:2000]), r"__1_0\.distcp .* is cut off"),
        (listed(set_offset), "do not make up the tensor"),
        (listed(lambda content, name: content.storage_data.pop(second(content, name)[0])), "do not make up the tensor"),
        (
            listed(
                lambda content, name: setattr(content.state_dict_metadata[name], "size", torch.Size((10**9, 10**9)))
            ),
            "do not make up",
        ),
        (listed(set_file("../directory/run.ckpt/__1_0.distcp")), "names .* no file beside it"),
        (listed(share), "two shards lie in one place"),
        (listed(forget_steps), "the steps of '.*q_proj' are not there"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    damage: Callable[[Path], Any], complaint: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = Path(shutil.copytree(runs / "directory" / "run.ckpt", tmp_path / "run.ckpt"))
    damage(checkpoint)
    model = tiny_llama(**SIZES)
    with pytest.raises(PaCAError, match=complaint):
        load_adapter(model, checkpoint)
    assert_same(model, tiny_llama(**SIZES))
    assert not Path("hostile").exists()


def test_a_checkpoint_without_paca_is_refused(runs: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(runs / "directory" / "run.ckpt", tmp_path / "run.ckpt"))
    content = torch.load(checkpoint / "meta.pt", weights_only=True)
    del content["paca_adapter"]
    torch.save(content, checkpoint / "meta.pt")
    with pytest.raises(PaCAError, match="does not tell how its adapter was made"):
        load_adapter(tiny_llama(**SIZES), checkpoint)
