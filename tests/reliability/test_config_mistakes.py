"""Mistakes that people make in a config or on the command line: the message names the key, the value and a remedy."""

import sys
from pathlib import Path

import pytest

from tests.test_cli import DEBUG, ROOT, failure, output_to

PACA = "--trainer.callbacks=PaCAStrategy"
CONFIG = "--trainer.callbacks.config."
OPTIMIZER = "--model.init_args.optimizer"

MISTAKES: list[tuple[list[str], list[str]]] = [
    # A key that is mistyped
    (["--trainer.max_epocs=3"], ["--trainer.max_epocs=3", "fit --help lists the options"]),
    (["--model.init_args.dtypo=auto"], ["dtypo", "fit --help lists the options"]),
    ([PACA, f"{CONFIG}rank=8"], ["rank", "is not accepted"]),
    # A value of another type
    (["--trainer.max_epochs=three"], ["trainer.max_epochs", "three", "Expected a <class 'int'>"]),
    (["--data.init_args.batch_size=2.5"], ["batch_size", "2.5", "Expected a <class 'int'>"]),
    ([PACA, f"{CONFIG}r=eight"], ['"r"', "eight", "Expected a <class 'int'>"]),
    ([f"{OPTIMIZER}.init_args.lr=fast"], ["lr", "fast", "Expected a <class 'float'>"]),
    # A name that is mistyped
    (["--trainer.precision=bf61"], ["trainer.precision", "bf61", "'bf16-mixed'"]),
    (["--trainer.accelerator=gpuu"], ["accelerator='gpuu'", "Available names are: auto, "]),
    (["--trainer.strategy=paca_fspd2"], ["strategy='paca_fspd2'", "Example choices: auto, ddp"]),
    (["--trainer.callbacks=PaCAStrategi"], ["trainer.callbacks", "PaCAStrategi"]),
    ([f"{OPTIMIZER}=torch.optim.AdaW"], ["optimizer", "torch.optim.AdaW"]),
    ([PACA, "--trainer.callbacks.nonfinite=stopp"], ["nonfinite", "stopp", "['stop', 'skip']"]),
    ([PACA, f"{CONFIG}selection=randm"], ["selection='randm'", "Choose one of ['random', 'weight_norm'"]),
    ([PACA, f"{CONFIG}quantize=nf5"], ["quantize='nf5'", "Choose one of ['nf4']"]),
    ([PACA, f"{CONFIG}target_modules=[q_porj]"], ["target_modules", "'q_porj'", "Did you mean 'q_proj'?"]),
    ([PACA, f"{CONFIG}exclude_modules=[lm_haed]"], ["exclude_modules", "'lm_haed'", "Did you mean 'lm_head'?"]),
    ([PACA, f"{CONFIG}modules_to_save=[lm_haed]"], ["modules_to_save", "'lm_haed'", "Did you mean 'lm_head'?"]),
    ([PACA, f"{CONFIG}rank_pattern={{q_porj: 4}}"], ["rank_pattern", "'q_porj'", "Did you mean 'q_proj'?"]),
    ([PACA, f"{CONFIG}target_modules=(q_proj"], ["target_modules='(q_proj'", "missing ), unterminated subpattern"]),
    (["--model.init_args.attn_implementation=flash"], ['attn_implementation="flash"', "only possible arguments"]),
    (["--model.init_args.loss_normalization=token"], ["loss_normalization", "token", "['tokens', 'batch']"]),
    (["--data.init_args.format=alpca"], ["format", "alpca", "'alpaca'"]),
    (["--data.init_args.on_bad_row=skip"], ["on_bad_row", "skip", "['error', 'drop']"]),
    # A number out of range
    ([PACA, f"{CONFIG}r=0"], ["r must be a positive integer, not 0"]),
    ([PACA, f"{CONFIG}r=4096"], ["r=4096", "Lower r, or use rank_pattern"]),
    ([PACA, f"{CONFIG}alpha=-2"], ["alpha must be a positive number, not -2.0"]),
    ([PACA, f"{CONFIG}target_modules=[]"], ["target_modules is empty", "Name some layers, or 'all-linear'"]),
    (["--trainer.devices=0"], ["devices='0'", "not a valid input"]),
    (["--trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches is 0", "must be at least 1"]),
    (["--trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val is -1", "must be at least 0"]),
    (["--trainer.log_every_n_steps=-5"], ["trainer.log_every_n_steps is -5", "must be at least 0"]),
    (["--trainer.limit_train_batches=1.5"], ["1.5 for limit_train_batches", "has to be in [0.0, 1.0] or an int"]),
    (["--seed_everything=-1"], ["seed_everything is -1", "must lie between 0 and 4294967295"]),
    (["--data.init_args.max_length=0"], ["max_length is 0", "must be at least 2"]),
    (["--data.init_args.num_workers=-1"], ["num_workers is -1", "must be at least 0"]),
    (["--model.init_args.loss_chunk_size=0"], ["loss_chunk_size must be at least 1, not 0"]),
    # Something that is not there
    (["--data.init_args.train=nowhere.jsonl"], ["nowhere.jsonl: no such file", "looked for"]),
    (["--data.init_args.tokenizer=nowhere"], ["tokenizer 'nowhere'", "Give a directory that `save_pretrained` wrote"]),
    (["--model.init_args.model=configs/nowhere"], ["model directory 'configs/nowhere' does not exist", "looked for"]),
    ([PACA, "--trainer.callbacks.adapter=/nowhere"], ["/nowhere/adapter_config.json is missing"]),
    (["--ckpt_path=nowhere.ckpt"], ["no checkpoint 'nowhere.ckpt' (--ckpt_path)"]),
    # Settings that contradict each other
    (
        ["--trainer.enable_checkpointing=false", "--trainer.callbacks+=ModelCheckpoint"],
        ["enable_checkpointing=False", "ModelCheckpoint"],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "parts"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_told_with_its_key_its_value_and_a_remedy(
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["paca-lightning"])
    short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1"]
    code, message = failure(["fit", *DEBUG, *output_to(tmp_path), *short, *arguments], capsys)
    assert code == 2
    assert [part for part in parts if part not in message] == []
    assert "Traceback" not in message
