import json
import math
import shutil

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.data.batch import model_inputs
from paca_lightning.tasks.instruction import InstructionDataModule
from paca_lightning.tasks.metrics import MeanTokenLoss
from paca_lightning.tasks.schedules import ConstantSchedule, CosineSchedule, LinearSchedule
from tests.tiny import tiny_model_directory, tiny_tokenizer

VOCABULARY = 384


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny_model_directory(tmp_path_factory.mktemp("tiny") / "model"))


def batches(count=6, rows=2, seed=0):
    """Batches of varied length and share of trained tokens, padded on the right, in a loader."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = 8 + 3 * (index % 3)
        ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[:, : 1 + index % 4] = -100
        labels[0, -2:], mask[0, -2:] = -100, 0
        made.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return DataLoader(made, batch_size=None)


def trainer(tmp_path, **settings):
    defaults = {
        "accelerator": "cpu",
        "logger": CSVLogger(tmp_path, name=None, version=""),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(defaults | settings))


class Metrics(Callback):
    """Collects what was logged, step by step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *args):
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class FreezeAllButHead(Callback):
    def on_fit_start(self, trainer, pl_module):
        assert pl_module.model is not None

    def setup(self, trainer, pl_module, stage):
        configure = pl_module.configure_model

        def configure_and_freeze():
            configure()
            pl_module.model.requires_grad_(False)
            pl_module.model.lm_head.requires_grad_(True)

        pl_module.configure_model = configure_and_freeze


def learned(tmp_path, module, **settings):
    """Train on one batch again and again, and return the first and last loss."""
    metrics = Metrics()
    loader = DataLoader(list(batches(1)) * 15, batch_size=None)
    trainer(tmp_path, callbacks=[metrics, *settings.pop("callbacks", [])], **settings).fit(module, loader)
    losses = [row["train/loss"] for row in metrics.rows[1:]]
    return losses[0], losses[-1]


def adamw(lr):
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_training_learns_in_every_precision(directory, tmp_path, precision):
    seed_everything(0)
    first, last = learned(tmp_path, CausalLMModule(directory, optimizer=adamw(3e-3)), precision=precision)
    assert last < 0.7 * first


def test_gradients_are_those_of_the_model_alone(directory):
    module = CausalLMModule(directory, loss_chunk_size=5)
    module.configure_model()
    reference = AutoModelForCausalLM.from_pretrained(directory)
    batch = next(iter(batches()))

    loss = module.training_step(batch, 0)
    loss.backward()
    expected = reference(**batch).loss
    expected.backward()

    torch.testing.assert_close(loss, expected)
    for (name, ours), theirs in zip(module.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("frozen_below", [True, False])
def test_activation_checkpointing_changes_no_gradient_and_saves_memory(directory, frozen_below):
    def run(**settings):
        saved = []
        module = CausalLMModule(directory, **settings)
        module.configure_model()
        module.model.requires_grad_(not frozen_below)
        for layer in module.model.model.layers:
            layer.mlp.down_proj.requires_grad_(True)

        def pack(tensor):
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = module.training_step(next(iter(batches())), 0)
        loss.backward()
        return sum(saved), [parameter.grad for parameter in module.parameters() if parameter.requires_grad]

    plain_saved, plain_grads = run()
    saved, grads = run(activation_checkpointing=True)
    assert saved < 0.5 * plain_saved
    torch.testing.assert_close(grads, plain_grads, rtol=0, atol=0)


def test_logs_loss_perplexity_and_gradient_norm_at_logging_steps_only(directory, tmp_path):
    metrics = Metrics()
    run = trainer(tmp_path, callbacks=[metrics, LearningRateMonitor()], log_every_n_steps=2)
    module = CausalLMModule(directory, optimizer=adamw(0.0))
    run.fit(module, batches(6), batches(2))

    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "train/perplexity", "train/grad_norm", "val/loss", "val/perplexity", "lr-AdamW"} <= set(
        rows[0].split(",")
    )
    assert "train/loss" not in metrics.rows[0]

    # Nothing was learned, so the last logged loss is that of the last two batches, token by token.
    with torch.no_grad():
        sums = [module.loss(module.model, model_inputs(batch), batch["labels"]) for batch in list(batches(6))[4:]]
    mean = sum(total for total, _ in sums) / sum(tokens for _, tokens in sums)
    assert run.callback_metrics["train/loss"] == pytest.approx(float(mean), rel=1e-6)
    assert run.callback_metrics["train/perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_gradient_norm_is_that_of_the_whole_gradient(directory, tmp_path):
    class Norm(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.expected = torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]).norm()

    norm = Norm()
    run = trainer(tmp_path, callbacks=[norm, FreezeAllButHead()], accumulate_grad_batches=2, gradient_clip_val=1e-3)
    run.fit(CausalLMModule(directory), batches(4))
    torch.testing.assert_close(run.callback_metrics["train/grad_norm"], norm.expected)


def test_validation_loss_weighs_every_token_alike(directory, tmp_path):
    module = CausalLMModule(directory)
    run = trainer(tmp_path)
    (result,) = run.validate(module, batches(5), verbose=False)

    reference, total, tokens = AutoModelForCausalLM.from_pretrained(directory), 0.0, 0
    for batch in batches(5):
        count = int((batch["labels"][:, 1:] != -100).sum())
        total, tokens = total + reference(**batch).loss.item() * count, tokens + count
    assert result["val/loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert result["val/perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    (tested,) = run.test(module, batches(5), verbose=False)
    assert tested["test/loss"] == result["val/loss"]


def test_bf16_true_logs_the_mean_over_hundreds_of_batches(directory, tmp_path):
    """A sum of 500 losses does not fit into bf16: it would stop growing, and the mean would keep falling."""
    run = trainer(tmp_path, precision="bf16-true", log_every_n_steps=500)
    module = CausalLMModule(directory, optimizer=adamw(0.0))
    loader = DataLoader(list(batches(5)) * 100, batch_size=None)
    run.fit(module, loader, loader)

    with torch.no_grad():
        sums = [module.loss(module.model, model_inputs(batch), batch["labels"]) for batch in batches(5)]
    mean = sum(float(total) for total, _ in sums) / sum(int(tokens) for _, tokens in sums)
    assert run.callback_metrics["train/loss"] == pytest.approx(mean, rel=1e-3)
    assert run.callback_metrics["val/loss"] == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda module: module.bfloat16(), torch.float32),
        (lambda module: module.to(torch.float16), torch.float32),
        (lambda module: module.to(torch.float64), torch.float64),
        (lambda module: module.to_empty(device="cpu"), torch.float32),
    ],
    ids=["bfloat16", "float16", "float64", "to_empty"],
)
def test_the_metric_keeps_its_state_in_fp32_or_wider_wherever_it_moves(cast, dtype):
    metric = MeanTokenLoss()
    metric.update(torch.tensor(1000.5), torch.tensor(3))
    cast(torch.nn.ModuleList([metric]))
    assert (metric.total.dtype, metric.tokens.dtype) == (dtype, torch.int64)
    assert metric.compute() == torch.tensor(1000.5 / 3, dtype=dtype)
    metric.reset()
    assert (metric.total.dtype, metric.total.item(), metric.tokens.item()) == (dtype, 0, 0)


def test_the_schedule_is_planned_over_the_whole_run(directory, tmp_path):
    class Rates(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, *args):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    module = CausalLMModule(
        directory, optimizer=adamw(1.0), lr_scheduler=lambda optimizer: LinearSchedule(optimizer, warmup_ratio=0.5)
    )
    trainer(tmp_path, callbacks=[rates], max_epochs=2, accumulate_grad_batches=3).fit(module, batches(6))
    # 4 optimizer steps of 3 batches each, the first 2 of them warm-up
    assert rates.seen[::3] == [0, 0.5, 1, 0.5]


def test_a_run_that_diverges_says_so(directory, tmp_path):
    module = CausalLMModule(directory, optimizer=adamw(float("inf")))
    with pytest.warns(UserWarning, match=r"train/loss is nan at step \d: it diverges"):
        trainer(tmp_path).fit(module, batches(3))


def test_a_schedule_needs_a_run_with_an_end(directory, tmp_path):
    module = CausalLMModule(directory, lr_scheduler=CosineSchedule)
    with pytest.raises(PaCAError, match="max_steps or max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(module, batches(2))


def test_a_constant_rate_needs_no_run_with_an_end(directory, tmp_path):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    module = CausalLMModule(
        directory, optimizer=adamw(1.0), lr_scheduler=lambda optimizer: ConstantSchedule(optimizer, warmup_steps=4)
    )
    run = trainer(tmp_path, max_epochs=-1, callbacks=[Stop()])
    run.fit(module, batches(2))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.5


def test_reduce_on_plateau_steps_after_each_epoch(directory, tmp_path):
    seen = []

    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(float(metrics))
            super().step(metrics)

    run = trainer(tmp_path, max_epochs=2, val_check_interval=2)
    run.fit(CausalLMModule(directory, lr_scheduler=Plateau), batches(4), batches(2))
    assert len(seen) == 2
    assert seen[-1] == run.callback_metrics["val/loss"]


def test_nothing_to_train_is_an_error(directory, tmp_path):
    class Freeze(FreezeAllButHead):
        def setup(self, trainer, pl_module, stage):
            pl_module.configure_model()
            pl_module.model.requires_grad_(False)

    with pytest.raises(PaCAError, match="nothing to train"):
        trainer(tmp_path, callbacks=[Freeze()]).fit(CausalLMModule(directory), batches(2))


def test_training_mode_and_cache_are_set_for_training(directory):
    module = CausalLMModule(directory)
    module.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model
    assert all(part.training for part in model.modules())
    assert model.config.use_cache


def test_bf16_true_leaves_rotary_frequencies_alone(directory, tmp_path):
    module = CausalLMModule(directory)
    trainer(tmp_path, precision="bf16-true", limit_val_batches=1).validate(module, batches(1), verbose=False)
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    ours, theirs = module.model.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(module(next(iter(batches()))), expected(**next(iter(batches()))).logits)


def test_logits_of_packed_documents_are_those_of_each_alone(directory):
    module = CausalLMModule(directory)
    module.configure_model()
    first, second = torch.randint(VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0)).split([10, 14], 1)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    with torch.no_grad():
        packed = module({"input_ids": torch.cat([first, second], 1), "position_ids": positions})
        alone = [module({"input_ids": document}) for document in (first, second)]
    torch.testing.assert_close(packed, torch.cat(alone, 1))


def test_random_weights_need_no_weight_file(tmp_path):
    directory = tiny_model_directory(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    module = CausalLMModule(str(directory), pretrained=False)
    module.configure_model()
    assert sum(p.numel() for p in module.parameters()) > 100_000

    with torch.device("meta"):
        shape = CausalLMModule(str(directory))
        shape.configure_model()
    assert {p.device.type for p in shape.parameters()} == {"meta"}


def test_checkpoints_hold_primitive_settings_and_load_without_pickle(directory, tmp_path):
    run = trainer(tmp_path)
    module = CausalLMModule(directory, loss_chunk_size=7, lr_scheduler=LinearSchedule)
    run.fit(module, batches(1))
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["loss_chunk_size"] == 7
    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    torch.testing.assert_close(loaded.state_dict(), module.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "/nowhere/at/all"}, "directory '/nowhere/at/all' does not exist"),
        ({"model": "./nowhere"}, "does not exist"),
        ({"dtype": "bf16"}, "dtype='bf16' is unknown"),
        ({"attn_implementation": "magic"}, "could not be loaded"),
        ({"loss_chunk_size": 0}, "loss_chunk_size"),
        ({"activation_checkpointing": "Selective"}, "activation_checkpointing='Selective' is unknown"),
    ],
)
def test_wrong_settings_are_named(directory, settings, message):
    with pytest.raises(PaCAError, match=message):
        CausalLMModule(**({"model": directory} | settings)).configure_model()


def test_a_directory_without_a_model_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(PaCAError, match=r"no config.json.*notes\.txt"):
        CausalLMModule(str(tmp_path)).configure_model()


def test_a_directory_without_weights_is_named(tmp_path):
    directory = tiny_model_directory(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    with pytest.raises(PaCAError, match="could not be loaded"):
        CausalLMModule(str(directory)).configure_model()


def test_a_hub_id_while_offline_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PaCAError, match="Without network, give a local directory"):
        CausalLMModule("nobody/no-such-model").configure_model()


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss(directory):
    batch = next(iter(batches()))
    plain, compiled = CausalLMModule(directory), CausalLMModule(directory, compile=True)
    for module in (plain, compiled):
        module.configure_model()
    torch.testing.assert_close(compiled.training_step(batch, 0), plain.training_step(batch, 0))


def test_weights_that_are_missing_or_cut_off_are_named(directory, tmp_path):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "up_proj" not in name}, file, {"format": "pt"})
    with pytest.raises(PaCAError, match=r"lack 2 tensors .*'model\.layers\.0\.mlp\.up_proj\.weight'"):
        CausalLMModule(str(tmp_path)).configure_model()
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(PaCAError, match="could not be loaded"):
        CausalLMModule(str(tmp_path)).configure_model()


# Data and model together


def write_gpt2(directory):
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)


def rows(tmp_path):
    row = {"instruction": "What is your name?", "output": "My name is Ada."}
    (tmp_path / "rows.json").write_text(json.dumps([row] * 4))
    return str(tmp_path / "rows.json")


def run_on(tmp_path, stage, module, tokenizer, **settings):
    data = InstructionDataModule(str(tokenizer), *[rows(tmp_path)] * 3, **{"max_length": 48, **settings})
    return getattr(trainer(tmp_path, max_steps=1), stage)(module, datamodule=data)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path, stage):
    directory = str(tiny_model_directory(tmp_path / "model", vocab_size=300))
    with pytest.raises(
        PaCAError, match=r"tokenizer .* has \d+ tokens, but the model has 300 embeddings: 'Qu' is number 300"
    ):
        run_on(tmp_path, stage, CausalLMModule(directory), directory)


def test_added_tokens_without_an_embedding_are_refused_if_the_data_may_hold_them(tmp_path):
    tokenizer = tiny_tokenizer()
    directory = tiny_model_directory(tmp_path / "model", vocab_size=len(tokenizer))
    module = CausalLMModule(str(directory))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # as Gemma 3 has one
    tokenizer.save_pretrained(tmp_path / "image")
    run_on(tmp_path, "fit", module, tmp_path / "image")
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    tokenizer.save_pretrained(tmp_path / "padded")
    with pytest.raises(PaCAError, match="'<new pad>' is number"):
        run_on(tmp_path, "fit", module, tmp_path / "padded")


def test_the_tokenizer_of_another_model_is_refused(directory, tmp_path):
    other = ByteLevelBPETokenizer()
    other.train_from_iterator(["To be or not to be"], vocab_size=300, special_tokens=["<eos>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=other._tokenizer, eos_token="<eos>").save_pretrained(tmp_path / "other")
    with pytest.raises(PaCAError, match="is another one than that of the model"):
        run_on(tmp_path, "fit", CausalLMModule(directory), tmp_path / "other", max_length=200)
    # Random weights have learned no words yet.
    run_on(tmp_path, "fit", CausalLMModule(directory, pretrained=False), tmp_path / "other", max_length=200)


def test_a_copy_of_the_models_tokenizer_with_a_token_more_fits(directory, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path / "copy")
    run_on(tmp_path, "fit", CausalLMModule(directory), tmp_path / "copy")


def test_rows_longer_than_learned_positions_are_refused(tmp_path):
    write_gpt2(tmp_path / "gpt2")
    module = CausalLMModule(str(tmp_path / "gpt2"))
    with pytest.raises(PaCAError, match=r"max_length is 128, but the model has learned 64 positions"):
        run_on(tmp_path, "fit", module, tmp_path / "gpt2", max_length=128)
    run_on(tmp_path, "fit", module, tmp_path / "gpt2", max_length=64)


def test_other_peoples_data_modules_are_only_warned_of(tmp_path):
    class Own(LightningDataModule):
        tokenizer = tiny_tokenizer()

        def train_dataloader(self):
            return DataLoader([{name: t.clamp(max=299) for name, t in b.items()} for b in batches(1)], batch_size=None)

    directory = str(tiny_model_directory(tmp_path / "model", vocab_size=300))
    with pytest.warns(UserWarning, match="Own does not fit the model"):
        trainer(tmp_path).fit(CausalLMModule(directory), datamodule=Own())
