import json

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.callbacks.sample_answers import SampleAnswers
from paca_lightning.tasks.causal_lm import CausalLMModule
from tests.tasks.runs import Metrics, adamw, trainer
from tests.tiny import tiny_tokenizer

QUESTION, ANSWER = "What is your name?", "My name is Ada [bold]."


class Chat(LightningDataModule):
    """One conversation, again and again."""

    def __init__(self, repeats=40):
        super().__init__()
        self.repeats = repeats
        self.tokenizer = tiny_tokenizer()

    def train_dataloader(self):
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
        ids = self.tokenizer.apply_chat_template(messages, return_tensors="pt")["input_ids"]
        batch = {"input_ids": ids, "labels": ids}
        return torch.utils.data.DataLoader([batch] * self.repeats, batch_size=None)


@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("32-true", {}),
        ("bf16-mixed", {"activation_checkpointing": True}),
        pytest.param("32-true", {"compile": True}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("compiled_without_kernels")
def test_answers_before_and_after_training_are_printed_and_written(directory, tmp_path, capsys, precision, settings):
    module = CausalLMModule(directory, optimizer=adamw(1e-2), **settings)
    callback = SampleAnswers([QUESTION], max_new_tokens=24)
    trainer(tmp_path, callbacks=[callback], precision=precision).fit(module, datamodule=Chat())

    (row,) = json.loads((tmp_path / "answers.json").read_text())
    assert row["prompt"] == QUESTION
    assert row["before"] != ANSWER
    assert row["after"] == ANSWER
    printed = capsys.readouterr().out
    assert "Answers before training" in printed
    assert "Ada [bold]." in printed
    assert [path.name for path in tmp_path.glob("*answers*")] == ["answers.json"]


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
def test_asking_leaves_the_model_and_the_training_as_they_were(directory, tmp_path):
    def losses(callbacks):
        module = CausalLMModule(directory, optimizer=adamw(1e-3))
        module.configure_model()
        module.model.model.layers[0].eval()
        metrics = Metrics()
        trainer(tmp_path, callbacks=[*callbacks, metrics]).fit(module, datamodule=Chat(4))
        assert not module.model.model.layers[0].training
        assert module.model.model.layers[1].training
        return [row["train/loss"] for row in metrics.rows[1:]]

    assert losses([SampleAnswers([QUESTION], max_new_tokens=2)]) == losses([])


def test_a_resumed_run_has_no_answers_from_before_training(directory, tmp_path, capsys):
    first = trainer(tmp_path)
    first.fit(CausalLMModule(directory), datamodule=Chat(2))
    first.save_checkpoint(tmp_path / "first.ckpt")
    run = trainer(tmp_path / "second", callbacks=[SampleAnswers([QUESTION], max_new_tokens=2)], max_epochs=2)
    run.fit(CausalLMModule(directory), datamodule=Chat(2), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    (row,) = json.loads((tmp_path / "second" / "answers.json").read_text())
    assert set(row) == {"prompt", "after"}
    printed = capsys.readouterr().out
    assert "Answers after training" in printed
    assert "before" not in printed


@pytest.mark.parametrize("model", [None, torch.nn.Linear(4, 4)])
def test_a_module_without_a_language_model_is_found_before_training(directory, tmp_path, model):
    class Foreign(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch):
            raise AssertionError("training has begun")

        def configure_optimizers(self):
            return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])

    run = trainer(tmp_path, callbacks=[SampleAnswers([QUESTION])])
    with pytest.raises(PaCAError, match=f"in the attribute 'model' of Foreign, .* {type(model).__name__}"):
        run.fit(Foreign(), datamodule=Chat(1))


def test_a_tokenizer_can_be_named(directory, tmp_path):
    callback = SampleAnswers([QUESTION, "And yours?"], max_new_tokens=3, tokenizer=directory)
    module = CausalLMModule(directory)
    trainer(tmp_path, callbacks=[callback]).fit(module, Chat(1).train_dataloader())
    assert [row["prompt"] for row in json.loads((tmp_path / "answers.json").read_text())] == [QUESTION, "And yours?"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "one question"}, "list of questions"),
        ({"prompts": []}, "list of questions"),
        ({"prompts": ["  "]}, "list of questions"),
        ({"prompts": ["a"], "max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(PaCAError, match=message):
        SampleAnswers(**arguments)


def test_a_missing_tokenizer_or_template_is_found_before_training(directory, tmp_path):
    def fit(data, **arguments):
        callback = SampleAnswers([QUESTION], **arguments)
        trainer(tmp_path, callbacks=[callback]).fit(CausalLMModule(directory), data)

    with pytest.raises(PaCAError, match="no tokenizer"):
        fit(Chat(1).train_dataloader())
    with pytest.raises(PaCAError, match="cannot be loaded"):
        fit(Chat(1).train_dataloader(), tokenizer=str(tmp_path))
    untold = Chat(1)
    untold.tokenizer.chat_template = None
    with pytest.raises(PaCAError, match="chat template"):
        fit(untold)


def test_a_run_directory_that_cannot_be_made_is_found_before_training(directory, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    run = trainer(tmp_path, callbacks=[SampleAnswers([QUESTION])], logger=False)
    run._default_root_dir = str(tmp_path / "file" / "run")
    with pytest.raises(PaCAError, match="cannot be written"):
        run.fit(CausalLMModule(directory), datamodule=Chat(1))
