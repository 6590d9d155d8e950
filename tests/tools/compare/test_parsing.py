"""Methods as users write them."""

import sys
from pathlib import Path
from typing import Any

import pytest

from paca_lightning import PaCAConfig, PaCAError, paca_layers
from paca_lightning.tools.compare.methods import FloorMethod, Method, PaCAMethod
from paca_lightning.tools.compare.parsing import PARAMETERS, RANK, parse_method, parse_methods
from paca_lightning.tools.compare.peft_methods import PEFTMethod
from paca_lightning.tools.compare.search import Space
from paca_lightning.tools.compare.task import Task
from tests.moe import moe_config
from tests.tiny import tiny_llama
from tests.tools.compare.tasks import ROOT, debug_task


@pytest.fixture(scope="module")
def task() -> Task:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["paca-lightning"])
        patch.chdir(__file__.rpartition("/tests/")[0])
        return debug_task("--trainer.callbacks=PaCAStrategy")


@pytest.mark.parametrize(
    ("text", "kind", "label", "options"),
    [
        ("paca:16", PaCAMethod, "paca:16", {"r": 16}),
        ("paca", PaCAMethod, "paca", {}),
        ("paca:4,alpha=1e-1,name=gentle", PaCAMethod, "gentle", {"r": 4, "alpha": 0.1}),
        ("paca:4,seed=3,lr=1e-3", PaCAMethod, "paca:4,seed=3", {"r": 4, "seed": 3}),
        ("paca,exclude_modules=[a,b]", PaCAMethod, "paca,exclude_modules=[a,b]", {"exclude_modules": ["a", "b"]}),
        ("paca,rank_pattern={a: 8, b: 2},name=x", PaCAMethod, "x", {"rank_pattern": {"a": 8, "b": 2}}),
        ("full", Method, "full", {}),
        ("floor", FloorMethod, "floor", {}),
        ("lora:8", PEFTMethod, "lora:8", {"r": 8}),
        ("dora:8", PEFTMethod, "dora:8", {"r": 8, "use_dora": True}),
        ("prefix:20", PEFTMethod, "prefix:20", {"num_virtual_tokens": 20}),
        ("prefix_tuning:20", PEFTMethod, "prefix_tuning:20", {"num_virtual_tokens": 20}),
        ("ia3", PEFTMethod, "ia3", {}),
        ("loha:4,alpha=8", PEFTMethod, "loha:4,alpha=8", {"r": 4, "alpha": 8}),
    ],
)  # fmt: skip
def test_a_method(text: str, kind: type[Method], label: str, options: dict[str, Any]) -> None:
    method = parse_method(text)
    assert (type(method), method.label, method.options) == (kind, label, options)


def test_a_method_has_learning_rates_of_its_own() -> None:
    assert parse_method("paca:4,lr=1e-4:1e-2").space == Space(1e-4, 1e-2)
    assert parse_method("full,lr=1e-5").space == Space(1e-5, 1e-5)
    assert parse_method("full").space is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lorra:8", "There is no method 'lorra'. Did you mean 'lora'?"),
        ("paca:0", "'0' is no size"),
        ("paca:x", "'x' is no size"),
        ("full:3", "Method 'full' has no size"),
        ("ia3:3", "Method 'ia3' has no size"),
        ("full,r=3", "Method 'full' has no options but name and lr, not r"),
        ("paca:4,selection", "'selection' is no option. Write OPTION=VALUE"),
        ("paca:4,lr=1e-2:1e-4", "is reversed"),
        ("lora:8,quantize=int8", "quantize='int8' is unknown. Choose 'nf4'"),
        ("lora:8,lora_alhpa=3", "LoraConfig has no field 'lora_alhpa'. Did you mean 'lora_alpha'?"),
    ],
)
def test_a_method_that_is_none(text: str, complaint: str) -> None:
    with pytest.raises(PaCAError, match=complaint):
        parse_method(text)


def test_paca_takes_every_setting_of_its_config(task: Task) -> None:
    method = parse_method("paca:4,selection=weight_norm,modules_to_save=[lm_head]")
    assert isinstance(method, PaCAMethod)
    expected = PaCAConfig(r=4, selection="weight_norm", modules_to_save=["lm_head"], seed=3)
    assert method.config(PaCAConfig(r=8, alpha=None), seed=3) == expected
    along = parse_method("paca:16,train_norms=true,norms_lr=0.25")
    assert isinstance(along, PaCAMethod)
    assert along.config(PaCAConfig(r=8)) == PaCAConfig(r=16, train_norms=True, norms_lr=0.25)
    with pytest.raises(PaCAError, match="Unknown PaCA settings"):
        parse_methods(["paca:4,selectoin=random", "full"], RANK, task)[0].count(task)


def test_qlora_is_lora_on_a_quantized_base(task: Task) -> None:
    lora, qlora, written = (parse_method(text) for text in ("lora:4", "qlora:4", "lora:4,quantize=nf4"))
    (plain,), (quantized,) = lora.callbacks(task, 0), qlora.callbacks(task, 0)
    assert quantized["init_args"] == plain["init_args"] | {"quantize": "nf4"}
    assert written.callbacks(task, 0) == [quantized]
    assert qlora.count(task) == lora.count(task)
    layers = [module for module in qlora.apply(tiny_llama(), task.paca).modules() if hasattr(module, "lora_A")]
    assert layers
    assert {type(layer.base_layer).__name__ for layer in layers} == {"Linear4bit"}


def test_a_method_keeps_what_the_config_says_of_paca(task: Task) -> None:
    base = PaCAConfig(r=8, target_modules=["q_proj"], seed=7)
    method = parse_method("paca:4")
    assert isinstance(method, PaCAMethod)
    assert method.config(base).target_modules == ["q_proj"]
    assert method.config(base, seed=2).seed == 2


def test_without_a_size_a_method_has_the_first_ones_rank(task: Task) -> None:
    methods = parse_methods(["floor", "paca:4", "lora", "lora:2", "ia3", "prefix"], RANK, task)
    assert [method.label for method in methods] == ["floor", "paca:4", "lora:4", "lora:2", "ia3", "prefix"]


def test_without_a_size_a_method_has_the_first_ones_number_of_parameters(task: Task) -> None:
    first, lora, prefix = parse_methods(["paca:16", "lora", "prefix"], PARAMETERS, task)
    assert isinstance(lora, PEFTMethod)
    wanted = first.count(task)
    assert abs(lora.count(task) - wanted) <= lora.resized(1).count(task) / 2
    assert prefix.count(task) == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        (["floor"], "no method to compare but the floor"),
        (["paca:4", "full,name=paca:4"], "Two methods are called 'paca-4'"),
    ],
)
def test_methods_that_cannot_be_compared(texts: list[str], complaint: str, task: Task) -> None:
    with pytest.raises(PaCAError, match=complaint):
        parse_methods(texts, RANK, task)


PEFT = "lora:4 dora:4 rslora:4 ia3 prefix:4 prompt:4 ptuning:4 llama-adapter:4 layernorm lntuning loha:4 hra:4 shira:4"


@pytest.mark.filterwarnings("ignore:Unsupported layer type .*LlamaRMSNorm")  # of PEFT, which tunes it all the same
@pytest.mark.parametrize("text", PEFT.split())
def test_methods_of_peft_fit_the_model(text: str, task: Task) -> None:
    trained = parse_method(text).count(task)
    assert 0 < trained < parse_method("full").count(task)


def test_lora_trains_stacked_experts_and_other_methods_say_that_they_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["paca-lightning"])
    monkeypatch.chdir(ROOT)
    moe_config("mixtral", vocab_size=512, max_position_embeddings=256).save_pretrained(tmp_path)
    experts = debug_task(f"--model.init_args.model={tmp_path}", "--trainer.callbacks=PaCAStrategy")
    # In two blocks: attention of 32 and 16 features, and four experts of 96 and 32 outputs.
    outputs, inputs = 2 * (2 * 32 + 2 * 16 + 4 * (96 + 32)), 2 * (4 * 32 + 4 * (32 + 48))
    assert parse_method("paca:4").count(experts) == 4 * outputs
    assert parse_method("lora:4").count(experts) == 4 * (outputs + inputs)
    assert parse_method("lora:4").left_frozen(experts) == []
    assert len(parse_method("loha:4").left_frozen(experts)) == 4
    with pytest.raises(PaCAError, match=r"'dora:4': PEFT refuses it: lora.ParamWrapper does not work with use_dora"):
        parse_method("dora:4").count(experts)
    moe_config("deepseek_v3", vocab_size=512, max_position_embeddings=256).save_pretrained(tmp_path)
    shared = debug_task(f"--model.init_args.model={tmp_path}", "--trainer.callbacks=PaCAStrategy")
    with pytest.raises(PaCAError, match=r"PEFT .* takes 'model\.layers\.0\.mlp\.gate_proj' .* for a part of stacked"):
        parse_method("lora:4").count(shared)


@pytest.mark.parametrize(
    "options", ["selection=gradient_norm", "selection=quant_error,column_steps=input_rms,quantize=nf4"]
)
def test_columns_that_data_choose_are_counted_and_timed_without_data(options: str) -> None:
    model = parse_method(f"paca:4,{options}").apply(tiny_llama(), PaCAConfig())
    assert {layer.r for _, layer in paca_layers(model)} == {4}
