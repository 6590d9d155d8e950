"""The data module and the evaluation callback under a Trainer, and in two processes."""

import csv
import json

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.distributed.fsdp import fully_shard

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.mmlu import MMLUDataModule, MMLUEvaluation
from paca_lightning.tasks.mmlu.evaluator import MMLUEvaluator
from paca_lightning.tasks.mmlu.sources import read_split
from tests.distributed_launch import launch
from tests.mmlu_files import CHOSEN, SIZES
from tests.tiny import tiny_llama, tiny_model_directory, tiny_tokenizer


def trainer(root, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=root, enable_checkpointing=False, **(quiet | settings))


@pytest.fixture
def model_directory(tmp_path):
    return str(tiny_model_directory(tmp_path / "model", max_position_embeddings=2048))


def data(mmlu, tokenizer, **settings):
    return MMLUDataModule(tokenizer, mmlu, **({"train": ["dev"], "batch_size": 4, "max_length": 1024} | settings))


def test_batches_hold_labels_where_the_answer_is(mmlu, model_directory):
    module = data(mmlu, model_directory)
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert sum(len(batch["input_ids"]) for batch in batches) == SIZES["dev"] * len(CHOSEN)
    for batch in batches:
        trained = batch["labels"] != -100
        assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])
        assert (trained.sum(1) == trained.sum(1)[0]).all()
        assert not trained[:, 0].any()


def test_validate_and_test_report_accuracy_without_being_asked(mmlu, model_directory, tmp_path, capsys):
    module, run = CausalLMModule(model_directory), trainer(tmp_path / "run")
    (validated,) = run.validate(module, data(mmlu, model_directory), verbose=False)
    assert {"val/loss", "mmlu/accuracy", "mmlu/letter/macro", "mmlu/likelihood/STEM"} <= set(validated)
    (tested,) = run.test(module, data(mmlu, model_directory), verbose=False)
    assert "sociology" in capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "mmlu" / "test-step=000000.json").read_text())
    assert (written["split"], written["shots"]) == ("test", 5)
    assert written["results"]["letter"][0]["accuracy"] == pytest.approx(tested["mmlu/accuracy"])
    with (tmp_path / "run" / "mmlu" / "test-step=000000.csv").open() as file:
        rows = list(csv.DictReader(file))
    by_subject = [row for row in rows if row["level"] == "subject" and row["method"] == "likelihood"]
    assert [row["name"] for row in by_subject] == CHOSEN
    assert {row["questions"] for row in by_subject} == {str(SIZES["test"])}


def test_training_shows_the_accuracy_before_it_beside_the_one_after(mmlu, model_directory, tmp_path, capsys):
    evaluation = MMLUEvaluation(methods=["letter"], shots=0, limit=2, baseline=True)
    module = CausalLMModule(model_directory, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    run = trainer(
        tmp_path / "run", max_epochs=3, callbacks=[evaluation], check_val_every_n_epoch=3, log_every_n_steps=1
    )
    run.fit(module, data(mmlu, model_directory))
    assert run.callback_metrics["train/loss"] < 5
    assert "before" in capsys.readouterr().out
    micro = evaluation.results["letter"][0]
    assert micro.questions == 2 * len(CHOSEN)
    assert run.callback_metrics["mmlu/accuracy"] == pytest.approx(micro.accuracy)
    names = {path.name for path in (tmp_path / "run" / "mmlu").iterdir()}
    assert names == {
        f"{name}.{suffix}" for name in ("before-step=000000", "validate-step=000015") for suffix in ("csv", "json")
    }


def test_a_resumed_run_has_no_accuracy_before_training(mmlu, model_directory, tmp_path, capsys):
    def fit(root, **settings):
        evaluation = MMLUEvaluation(methods=["letter"], shots=0, limit=1, baseline=True)
        run = trainer(root, logger=CSVLogger(root, name=None, version=""), callbacks=[evaluation], **settings)
        run.fit(CausalLMModule(model_directory), data(mmlu, model_directory), ckpt_path=checkpoint, weights_only=True)
        return run, (root / "metrics.csv").read_text()

    checkpoint = None
    first, logged = fit(tmp_path / "first", max_epochs=1)
    assert "mmlu/before/accuracy" in logged
    checkpoint = tmp_path / "first.ckpt"
    first.save_checkpoint(checkpoint)
    capsys.readouterr()
    _, logged = fit(tmp_path / "second", max_epochs=2)
    assert "mmlu/accuracy" in logged
    assert "before" not in logged
    assert "before" not in capsys.readouterr().out
    assert [path.name for path in sorted((tmp_path / "second" / "mmlu").iterdir())] == [
        f"validate-step=000010.{suffix}" for suffix in ("csv", "json")
    ]


def test_a_run_directory_that_cannot_be_made_is_found_before_anything_runs(mmlu, model_directory, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    run = trainer(tmp_path / "file" / "run", callbacks=[MMLUEvaluation(mmlu, model_directory)])
    with pytest.raises(PaCAError, match=r"The run's directory: .* cannot be written"):
        run.test(ForeignModule(), torch.utils.data.DataLoader(torch.ones(2, 1)), verbose=False)


class ForeignModule(LightningModule):
    """A user's own module, which has a model and knows nothing of MMLU."""

    def __init__(self):
        super().__init__()
        self.model = tiny_llama(max_position_embeddings=2048)

    def test_step(self, batch):
        self.log("loss", batch.sum())


def test_any_module_and_any_data(mmlu, model_directory, tmp_path):
    evaluation = MMLUEvaluation(mmlu, model_directory, shots=1)
    run = trainer(tmp_path, callbacks=[evaluation])
    (metrics,) = run.test(ForeignModule(), torch.utils.data.DataLoader(torch.ones(2, 1)), verbose=False)
    assert metrics["mmlu/likelihood/micro"] == pytest.approx(evaluation.results["likelihood"][0].accuracy)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"source": None}, "has no source"),
        ({"tokenizer": None}, "has no tokenizer"),
        ({"subjects": ["anatomie"]}, "subjects: 'anatomie' .* Did you mean 'anatomy'"),
        ({"subjects": []}, "subjects must be a list"),
        ({"methods": ["letters"]}, "methods must be a list of"),
        ({"shots": 6}, "shots must be 0 to 5"),
        ({"limit": 0}, "limit is the number of questions"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"confidence": 95}, "confidence must lie between 0 and 1"),
        ({"max_length": 40}, "anatomy_test.csv, row 1: the question alone has"),
        ({"max_length": 4096}, "has 2048 positions, fewer than max_length=4096"),
    ],
)
def test_a_bad_setting_of_the_evaluation(settings, complaint, mmlu, model_directory, tmp_path):
    evaluation = MMLUEvaluation(**({"source": mmlu, "tokenizer": model_directory} | settings))
    run = trainer(tmp_path, callbacks=[evaluation])
    with pytest.raises(PaCAError, match=complaint):
        run.test(ForeignModule(), torch.utils.data.DataLoader(torch.ones(2, 1)), verbose=False)


@pytest.mark.parametrize("model", [None, torch.nn.Linear(1, 1), tiny_llama().model])
def test_a_module_without_a_language_model(model, mmlu, model_directory, tmp_path):
    module = ForeignModule()
    module.model = model
    run = trainer(tmp_path, callbacks=[MMLUEvaluation(mmlu, model_directory)])
    complaint = f"in the attribute 'model' of ForeignModule, where there is {type(model).__name__}"
    with pytest.raises(PaCAError, match=complaint):
        run.test(module, torch.utils.data.DataLoader(torch.ones(2, 1)), verbose=False)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"train": []}, "train must be a list"),
        ({"train": "dev"}, "train must be a list"),
        ({"subjects": ["biology"]}, "Did you mean 'college_biology'|Did you mean 'virology'"),
        ({"train": ["dev", "validation"]}, "'validation' is both trained on and validated on"),
        ({"train": ["/no/such.csv"]}, "/no/such.csv does not exist"),
        ({"tokenizer": "/no/tokenizer"}, "tokenizer '/no/tokenizer'"),
        ({"max_length": 20}, "row 1: the question has .* max_length=20"),
    ],
)
def test_a_bad_setting_of_the_data(settings, complaint, mmlu, model_directory):
    with pytest.raises(PaCAError, match=complaint):
        data(mmlu, **({"tokenizer": model_directory} | settings)).setup("fit")


# Two processes against one


def evaluate_in_two(mmlu, model_directory, root):
    module = CausalLMModule(model_directory)
    run = trainer(root, callbacks=[MMLUEvaluation(batch_size=3)], strategy="ddp", devices=2)
    run.test(module, data(mmlu, model_directory, batch_size=3), verbose=False)

    sharded = tiny_llama(max_position_embeddings=2048)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    # 15 questions by threes are five batches: one process has one less to do, and must join in all the same.
    questions, tokenizer = read_split(mmlu, "test")[:15], tiny_tokenizer()
    evaluator = MMLUEvaluator(questions, [], tokenizer, shots=0, batch_size=3)
    whole = evaluator.evaluate(tiny_llama(max_position_embeddings=2048), dist.get_rank(), 2)
    assert evaluator.evaluate(sharded, dist.get_rank(), 2) == whole


@pytest.mark.distributed
def test_two_processes_equal_one_exactly(mmlu, model_directory, tmp_path):
    """The last batches of a subject are smaller than the others, and their number is odd for the sharded model."""
    launch(evaluate_in_two, 2, mmlu, model_directory, str(tmp_path / "two"))
    run = trainer(tmp_path / "one", callbacks=[MMLUEvaluation(batch_size=3)])
    run.test(CausalLMModule(model_directory), data(mmlu, model_directory, batch_size=3), verbose=False)
    one, two = (tmp_path / name / "mmlu" / "test-step=000000.json" for name in ("one", "two"))
    assert json.loads(two.read_text()) == json.loads(one.read_text())
