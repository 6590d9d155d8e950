"""Output heads of many libraries are found, left alone with the way to train them, and missed before training."""

import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from paca_lightning import PaCAConfig, PaCAError, apply_paca, attach, paca_layers
from paca_lightning.conversion.inventory import take_inventory
from tests.tiny import tiny_llama

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = SIZES | {"vocab_size": 64, "pad_token_id": 0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Network(nn.Module):
    """Blocks with a projection before them and an output behind them, under any names: of torchvision's kind."""

    def __init__(self, classes: int = 5, zero: bool = False) -> None:
        super().__init__()
        self.patches = nn.Linear(12, 16)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.outputs = nn.Sequential(nn.Dropout(0.0), nn.Linear(16, classes))
        if zero:  # as torchvision begins the heads of its vision transformers
            nn.init.zeros_(self.outputs[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(self.blocks(self.patches(x)))


class Adapted(nn.Module):
    """A network, and a layer registered behind it that feeds it."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.adapter = Network(), nn.Linear(4, 12)


def llava_like() -> nn.Module:
    return nn.ModuleDict({"language": tiny_llama(), "vision": Network(), "projector": nn.Linear(5, 64)})


MODELS: dict[str, tuple[Any, set[str], set[str]]] = {  # model, heads over classes, and heads over a vocabulary
    "Llama": (tiny_llama, set(), {"lm_head"}),
    "Llama, classes": (
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**TEXT, num_key_value_heads=2)),
        {"score"},
        set(),
    ),
    "BERT": (lambda: hf.BertModel(hf.BertConfig(**TEXT)), set(), set()),
    "BERT, classes": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)), {"classifier"}, set()),
    "BERT, masked": (lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)), set(), {"cls.predictions.decoder"}),
    "BERT, answers": (lambda: hf.BertForQuestionAnswering(hf.BertConfig(**TEXT)), {"qa_outputs"}, set()),
    "RoBERTa": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT)),
        {"classifier.dense", "classifier.out_proj"},
        set(),
    ),
    "DistilBERT": (
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=64)
        ),
        {"pre_classifier", "classifier"},
        set(),
    ),
    "T5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), set(), {"lm_head"}),
    "T5, classes": (
        lambda: hf.T5ForSequenceClassification(hf.T5Config(**T5)),
        {"classification_head.dense", "classification_head.out_proj"},
        set(),
    ),
    "T5, answers": (lambda: hf.T5ForQuestionAnswering(hf.T5Config(**T5)), {"qa_outputs"}, set()),
    "ViT": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=32, patch_size=16)),
        {"classifier"},
        set(),
    ),
    "blocks": (Network, {"outputs.1"}, set()),
    "blocks inside a module": (lambda: nn.ModuleDict({"net": Network()}), {"net.outputs.1"}, set()),
    "blocks that are fed": (Adapted, {"network.outputs.1"}, set()),
    "blocks with an output of their width": (lambda: Network(16), set(), set()),
    "two layers": (lambda: nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3)), set(), set()),
    "vision and language": (llava_like, {"vision.outputs.1"}, {"language.lm_head"}),
    "by name": (lambda: nn.ModuleDict({"a": nn.Linear(4, 4), "score": nn.Linear(4, 2)}), {"score"}, set()),
    "a container by name": (
        lambda: nn.ModuleDict({"a": nn.Linear(4, 4), "classifier": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))}),
        {"classifier.1"},
        set(),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_found(name: str) -> None:
    build, over_classes, over_vocabulary = MODELS[name]
    model = build()
    inventory = take_inventory(model)
    paths = {module: path for path, module in model.named_modules()}
    linears = {module for module in inventory.heads.all if isinstance(module, nn.Linear)}
    assert {paths[module] for module in inventory.heads.over_classes} == over_classes
    assert {paths[module] for module in linears - inventory.heads.over_classes} == over_vocabulary

    report = apply_paca(model, PaCAConfig(r=2))
    assert not {path for path, _ in paca_layers(model)} & (over_classes | over_vocabulary)
    assert {path for path, reason in report.skipped.items() if "modules_to_save" in reason} == over_classes


def test_the_report_tells_how_to_train_a_head() -> None:
    model = hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT))
    report = " ".join(str(apply_paca(model, PaCAConfig(r=2))).split())
    advice = "output head, frozen: list it in modules_to_save to train it."
    assert f"Left alone: classifier.dense and 1 more: {advice}" in report


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def test_a_frozen_head_over_classes_is_a_warning_before_training() -> None:
    model = hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT))
    apply_paca(model, PaCAConfig(r=2))
    with pytest.warns(UserWarning, match=r"The output head 'classifier' is frozen\. .*_save=\['classifier'\]"):
        attach(optimizer_of(model), model)
    model = nn.ModuleDict({"net": Network(zero=True)})
    apply_paca(model, PaCAConfig(r=2))
    with pytest.warns(UserWarning, match=r"'net\.outputs\.1' is frozen, and zero, so that no layer before it gets"):
        attach(optimizer_of(model), model)


def saved(model: nn.Module) -> None:
    apply_paca(model, PaCAConfig(r=2, modules_to_save=["outputs"]))


def named(model: nn.Module) -> None:
    apply_paca(model, PaCAConfig(r=2, target_modules=["up", "outputs.1"]))


def thawed(model: nn.Module) -> None:
    apply_paca(model, PaCAConfig(r=2))
    model.get_submodule("outputs").requires_grad_(True)


@pytest.mark.parametrize("convert", [saved, named, thawed])
def test_no_warning_where_the_head_is_trained(convert: Any) -> None:
    model = Network()
    convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(optimizer_of(model), model)


def test_the_head_of_a_language_model_is_no_reason_to_warn() -> None:
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(optimizer_of(model), model)


# ---- names that mean no linear layer


def mixtral() -> nn.Module:
    sizes = TEXT | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**sizes))


class OtherExperts(nn.Module):
    """Stacked experts with a forward of their own, as models outside transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 96, 32))


def test_experts_of_other_kinds_are_called_what_they_are() -> None:
    model = mixtral()
    for layer in model.model.layers:
        layer.mlp.experts = OtherExperts()
    with pytest.raises(PaCAError, match=r"'.*experts\.gate_up_proj' and 1 more is a 3-D parameter \(4x96x32\),"):
        apply_paca(model, PaCAConfig(r=2, target_modules=["q_proj", "gate_up_proj"]))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("embed_tokens", r"'model\.embed_tokens' is Embedding, and PaCA trains columns of linear layers"),
        ("self_attn", r"'model\.layers\.0\.self_attn' is LlamaAttention, .* Name those inside it"),
    ],
)
def test_another_module_is_called_what_it_is(target: str, message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        apply_paca(tiny_llama(), PaCAConfig(r=2, target_modules=[target]))


def test_all_linear_that_matches_nothing_does_not_advise_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda input: input  # type: ignore[method-assign]
    with pytest.raises(PaCAError, match=r"all 1 are left alone\. 0: Linear has a forward of its own") as error:
        apply_paca(model, PaCAConfig(r=2))
    assert "pass 'all-linear'" not in str(error.value)


def test_a_repeated_block_that_stands_elsewhere_first() -> None:
    shared, other = (nn.MultiheadAttention(1, 1) for _ in range(2))
    model = nn.Sequential(nn.Sequential(shared, nn.Sequential(nn.Sequential(shared, other))))
    with pytest.raises(PaCAError, match="all 2 are left alone"):  # attention of PyTorch reads its weights
        apply_paca(model, PaCAConfig(r=1))
