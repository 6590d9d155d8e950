"""PEFTStrategy: PEFT's methods on Lightning's clock, equal to PEFT alone, resumed bitwise, saved as PEFT saves."""

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from paca_lightning import AdapterCheckpoint, PaCAConfig, PaCAError, PaCAStrategy, PEFTStrategy
from tests.peft_warnings import PREFIXES
from tests.tiny import tiny_llama

TOKENS = torch.randint(3, 384, (40, 12), generator=torch.Generator().manual_seed(0))
IDS = TOKENS[:1]


class Module(L.LightningModule):
    """Trains a tiny Llama with the loss of its own logits."""

    def __init__(self, **overrides: Any) -> None:
        super().__init__()
        self.overrides = overrides
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = tiny_llama(**self.overrides)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.model, batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", loss_of(self.model, batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 8} | settings))


METHODS: dict[str, peft.PeftConfig] = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "rslora": lora(use_rslora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "llama-adapter": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=5),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=5),
    "layernorm": peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    "shira": peft.ShiraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "loha": peft.LoHaConfig(r=2, target_modules=["q_proj"]),
}
every_method = pytest.mark.parametrize("method", METHODS)
pytestmark = [
    PREFIXES,
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),  # PEFT's SHiRA
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),  # PEFT's LayerNorm tuning, of RMSNorm
]


def loader() -> DataLoader:
    return DataLoader(TOKENS, batch_size=4)


def fit(module: Module, directory: Path, *callbacks: Any, ckpt_path: Path | None = None, **settings: Any) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=directory,
        logger=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 2} | settings),
    )
    own = "train_dataloader" in vars(type(module))
    trainer.fit(module, None if own else loader(), ckpt_path=ckpt_path)
    return trainer


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def by_peft_alone(config: peft.PeftConfig) -> Any:
    """PEFT in a plain loop of 20 steps."""
    L.seed_everything(0, verbose=False)
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_llama(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in [*TOKENS.split(4), *TOKENS.split(4)]:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "layernorm", "prefix", "llama-adapter"])
def test_twenty_steps_equal_peft_alone_bitwise(method: str, tmp_path: Path) -> None:
    module = Module()
    trainer = fit(module, tmp_path, PEFTStrategy(METHODS[method]))
    assert trainer.global_step == 20
    expected = trained(by_peft_alone(METHODS[method]))
    assert [*trained(module).values()]
    for (name, value), reference in zip(trained(module).items(), expected.values(), strict=True):
        assert torch.equal(value, reference), name


@every_method
@pytest.mark.slow
def test_fit_resume_and_round_trip(method: str, tmp_path: Path) -> None:
    config = METHODS[method]
    whole, each = Module(), ModelCheckpoint(tmp_path, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    strategy = PEFTStrategy(config)
    fit(whole, tmp_path, strategy, each, AdapterCheckpoint(str(tmp_path / "adapter")))
    saved = torch.load(tmp_path / "0.ckpt", weights_only=True)["state_dict"]
    assert not any("embed_tokens" in name or name.endswith("base_layer.weight") for name in saved)

    resumed = Module()
    fit(resumed, tmp_path, PEFTStrategy(config), ckpt_path=tmp_path / "0.ckpt")
    assert same(trained(whole), trained(resumed))

    by_peft = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    whole.eval()
    with torch.no_grad():
        after, base = whole.model(input_ids=IDS).logits, tiny_llama().eval()(input_ids=IDS).logits
        theirs = by_peft(input_ids=IDS).logits[:, -IDS.shape[1] :]
        torch.testing.assert_close(theirs, after)
        assert not torch.allclose(after, base, atol=1e-4)
        if method == "pissa":  # which changes the base
            with pytest.raises(PaCAError, match="moves a part of each base weight"), strategy.disable():
                pass
            return
        with strategy.disable():
            torch.testing.assert_close(whole.model(input_ids=IDS).logits, base, rtol=1e-4, atol=1e-5)


def trained_with_validation(module: Module, strategy: L.Callback, directory: Path, batches: int) -> dict[str, Tensor]:
    """What a method trains in three steps, with a validation of so many batches before them."""
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, limit_val_batches=batches, num_sanity_val_steps=batches, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=directory, callbacks=[strategy],
    )  # fmt: skip
    loader = DataLoader(TOKENS, batch_size=4)  # type: ignore[arg-type]
    torch.manual_seed(0)
    trainer.fit(module.bfloat16(), loader, loader)
    return trained(module)


def test_qlora_trains_after_a_validation_as_without_it(tmp_path: Path) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes packs weights anew in eval mode, and its backward misreads them."""
    without, after = (
        trained_with_validation(
            Module(hidden_size=64, intermediate_size=128), PEFTStrategy(lora(), quantize="nf4"), tmp_path, batches
        )
        for batches in (0, 1)
    )
    assert same(without, after)


def test_qlora_trains_on_nf4_layers_and_saves_the_adapter_alone(tmp_path: Path) -> None:
    module = Module(intermediate_size=128)
    strategy = PEFTStrategy(lora(), quantize="nf4")
    fit(module, tmp_path, strategy, AdapterCheckpoint(str(tmp_path / "adapter")))
    layer = module.model.model.layers[0].self_attn.q_proj
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    assert layer.base_layer.weight.dtype == torch.uint8
    assert module.model.lm_head.weight.dtype == torch.float32
    assert all(".lora_" in name for name in module.state_dict())
    assert strategy.report is not None
    assert "Quantized to NF4: 14 linear layers." in strategy.report.notes
    assert any(bool(value.any()) for name, value in trained(module).items() if "lora_B" in name)


def test_bf16_keeps_the_adapter_in_fp32_and_resumes_bitwise(tmp_path: Path) -> None:
    each = ModelCheckpoint(tmp_path, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    whole, resumed = Module(), Module()
    fit(whole, tmp_path, PEFTStrategy(lora()), each, precision="bf16-true")
    assert {p.dtype for p in trained(whole).values()} == {torch.float32}
    assert whole.model.lm_head.weight.dtype == torch.bfloat16
    fit(resumed, tmp_path, PEFTStrategy(lora()), ckpt_path=tmp_path / "0.ckpt", precision="bf16-true")
    assert same(trained(whole), trained(resumed))


def test_a_run_begins_from_an_adapter(tmp_path: Path) -> None:
    first, second = Module(), Module()
    fit(first, tmp_path, PEFTStrategy(lora()), AdapterCheckpoint(str(tmp_path / "adapter")))
    strategy = PEFTStrategy(adapter=str(tmp_path / "adapter"))
    fit(second, tmp_path, strategy, limit_train_batches=0)
    assert same(trained(first), trained(second))
    with pytest.raises(PaCAError, match=r"was trained with r=4 \(here 2\)"):
        fit(Module(), tmp_path, PEFTStrategy(lora(r=2), adapter=str(tmp_path / "adapter")))


def test_any_module_without_a_hugging_face_model(tmp_path: Path) -> None:
    class Small(Module):
        def configure_model(self) -> None:
            if self.model is None:
                self.model = nn.Sequential(nn.Embedding(384, 8), nn.Linear(8, 384))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch).flatten(0, 1), batch.flatten())

    module = Small()
    fit(module, tmp_path, PEFTStrategy(lora(target_modules=["1"]), path="model"))
    assert list(trained(module)) == [f"model.1.lora_{name}.default.weight" for name in "AB"]


class PlainModule(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.lm_head.parameters(), lr=1e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [PEFTStrategy()], "needs a config"),
        (lambda: [PEFTStrategy(lora(), quantize="int8")], "quantize='int8' is unknown"),
        (lambda: [PEFTStrategy(lora(target_modules=["q_porj"]))], "PEFT cannot adapt LlamaForCausalLM with LoraConfig"),
        (lambda: [PEFTStrategy(peft.AdaLoraConfig(total_step=9))], "AdaLoraConfig cannot be trained"),
        (lambda: [PEFTStrategy(lora(), path="net")], "path='net' names no module"),
        (lambda: [PEFTStrategy(lora()), PaCAStrategy(PaCAConfig(r=2))], "PEFTStrategy and PaCAStrategy in one run"),
        (lambda: [PEFTStrategy(lora(), adapter="nowhere")], "'nowhere' is not an adapter of PEFT"),
    ],
)
def test_mistakes_are_named_before_training(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=message):
        fit(Module(), tmp_path, *make())


def test_an_optimizer_without_the_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match="8 of 8 trained parameters are in no optimizer"):
        fit(PlainModule(), tmp_path, PEFTStrategy(lora()))


def test_sharding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match="PEFTStrategy does not shard a model: FSDP2Strategy"):
        fit(Module(), tmp_path, PEFTStrategy(lora()), strategy="paca_fsdp2")


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    fit(Module(), tmp_path, PEFTStrategy(lora()), ModelCheckpoint(tmp_path, filename="last"))
    with pytest.raises(PaCAError, match=r"The checkpoint was trained with lora_alpha=8 \(here 16\)"):
        fit(Module(), tmp_path, PEFTStrategy(lora(lora_alpha=16)), ckpt_path=tmp_path / "last.ckpt")


def test_disable_needs_a_run() -> None:
    with pytest.raises(PaCAError, match="no model is adapted yet"), PEFTStrategy(lora()).disable():
        pass
