"""Models of other libraries, tiny and with the same weights each time, and how each computes a loss."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from paca_lightning import PaCAConfig
from tests.guests import modalities
from tests.guests.timm_import import import_timm
from tests.moe import tiny_moe
from tests.tiny import tiny_llama

IDS = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(8) % 5
AUDIO = torch.randn(8, 8, 40, generator=torch.Generator().manual_seed(2))
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIG = PaCAConfig(r=2)


def language_loss(model: Any, rows: Tensor) -> Tensor:
    return model(input_ids=IDS[rows], labels=IDS[rows]).loss


def class_loss(model: Any, rows: Tensor) -> Tensor:
    return model(input_ids=IDS[rows], labels=CLASSES[rows]).loss


def logit_loss(model: Any, rows: Tensor) -> Tensor:
    """Of a model that returns logits of the next token."""
    return F.cross_entropy(model(IDS[rows])[:, :-1].flatten(0, 1), IDS[rows][:, 1:].flatten())


def image_loss(model: Any, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(IMAGES[rows]), CLASSES[rows])


def speech_loss(model: Any, rows: Tensor) -> Tensor:
    return model(input_features=AUDIO[rows], labels=IDS[rows]).loss


@dataclass(frozen=True)
class Guest:
    """A model of another library.

    Attributes:
        build: Builds it with random weights; skips the test where its library is missing.
        loss: Of the model and the numbers of some of 8 rows.
        library: Whose model it is.
        config: What is trained.
        layers: How many layers that converts.
        left: The linear layers that stay as they are, whose reasons the report has; None: not looked at.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[Any, Tensor], Tensor]
    library: str
    layers: int
    config: PaCAConfig = field(default_factory=lambda: CONFIG)
    left: tuple[str, ...] | None = None

    def seeded(self) -> nn.Module:
        """The model, with the same weights each time and whatever the global random state is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build()


def litgpt() -> nn.Module:
    model = pytest.importorskip("litgpt.model", reason="litgpt is not installed")
    config = pytest.importorskip("litgpt.config").Config(
        n_layer=2, n_embd=32, n_head=4, padded_vocab_size=64, block_size=16, lm_head_bias=False
    )
    net: nn.Module = model.GPT(config)
    return net


def of_timm(name: str, **settings: Any) -> nn.Module:
    net: nn.Module = import_timm().create_model(name, num_classes=5, **settings)
    return net


class Block(nn.Module):
    """Attention and MLP, as in torchvision's vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.self_attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class BareViT(nn.Module):
    """A vision transformer built as torchvision's: patches by a convolution, and a head that begins with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, 32, 8, 8)
        self.layers, self.ln = nn.Sequential(Block(), Block()), nn.LayerNorm(32)
        self.heads = nn.Sequential()
        self.heads.add_module("output", nn.Linear(32, 5))
        nn.init.zeros_(self.heads[0].weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_proj(images).flatten(2).transpose(1, 2)
        return self.heads(self.ln(self.layers(x)).mean(1))


class Distillation(nn.Module):
    """Two Hugging Face models in one module, of which the first is frozen: a teacher and its student."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = tiny_llama(seed=1).requires_grad_(False)
        self.student = tiny_llama(seed=2)

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(input_ids=ids).logits.log_softmax(-1)
        return F.kl_div(
            self.student(input_ids=ids).logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True
        )


def distillation_loss(model: Any, rows: Tensor) -> Tensor:
    return model(IDS[rows])


def t5() -> nn.Module:
    config = hf.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, num_mel_bins=8, max_source_positions=20, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        n_layer=2, n_head=4, n_embd=32, vocab_size=64, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def falcon() -> nn.Module:
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    return hf.FalconForCausalLM(hf.FalconConfig(**sizes))


def mamba() -> nn.Module:
    return hf.MambaForCausalLM(hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4))


def gemma() -> nn.Module:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8))


def mixtral() -> nn.Module:
    sizes = SIZES | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**sizes))


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZES, **NO_DROPOUT, num_labels=5))


def roberta() -> nn.Module:
    config = hf.RobertaConfig(**SIZES, **NO_DROPOUT, num_labels=5, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return hf.RobertaForSequenceClassification(config)


HF, VIT = "transformers", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
MODELS: dict[str, Guest] = {
    "Llama": Guest(tiny_llama, language_loss, HF, 14),
    "GPT-2 (transposed layers)": Guest(gpt2, language_loss, HF, 8),
    "Falcon (linear layers with a forward of their own)": Guest(falcon, language_loss, HF, 8),
    "Gemma 2": Guest(gemma, language_loss, HF, 14),
    "Mixtral, with its experts": Guest(mixtral, language_loss, HF, 12),
    "Mixtral, experts alone": Guest(
        mixtral, language_loss, HF, 4, PaCAConfig(r=2, target_modules=["experts.gate_up_proj", "experts.down_proj"])
    ),
    **{
        f"{name}, with its experts": Guest(functools.partial(tiny_moe, kind), language_loss, HF, layers)
        for kind, (name, layers) in {
            "qwen2_moe": ("Qwen2-MoE", 20),
            "qwen3_moe": ("Qwen3-MoE", 12),
            "deepseek_v2": ("DeepSeek-V2", 18),
            "deepseek_v3": ("DeepSeek-V3", 18),
            "gpt_oss": ("GPT-OSS", 12),
        }.items()
    },
    "Mamba (`dt_proj`, whose weight it reads without calling it, stays frozen)": Guest(mamba, language_loss, HF, 6),
    "T5": Guest(t5, language_loss, HF, 32, left=("lm_head",)),
    "Whisper": Guest(whisper, speech_loss, HF, 16, left=("proj_out",)),
    "BERT, a new head trained whole": Guest(
        bert, class_loss, HF, 13, PaCAConfig(r=2, modules_to_save=["classifier"]), left=("classifier",)
    ),
    "RoBERTa, a new head trained whole": Guest(
        roberta, class_loss, HF, 12, PaCAConfig(r=2, modules_to_save=["classifier"])
    ),
    "ViT, a new head trained whole": Guest(
        modalities.vit,
        modalities.class_loss,
        HF,
        12,
        PaCAConfig(r=2, modules_to_save=["classifier"]),
        left=("classifier",),
    ),
    "CLIP, text and images": Guest(modalities.clip, modalities.pair_loss, HF, 26, left=()),
    "LLaVA, without the last block of its vision tower, whose output it does not read": Guest(
        modalities.llava,
        modalities.answer_loss,
        HF,
        22,
        PaCAConfig(r=2, exclude_modules=[modalities.UNREAD]),
        left=("lm_head", *modalities.UNREAD_LAYERS),
    ),
    "a frozen teacher and its student in one module": Guest(Distillation, distillation_loss, HF, 14),
    "LitGPT": Guest(litgpt, logit_loss, "litgpt", 8),
    "timm's vision transformer": Guest(
        functools.partial(of_timm, "vit_tiny_patch16_224", **VIT),
        image_loss,
        "timm",
        8,
        PaCAConfig(r=2, modules_to_save=["head"]),
        left=("head",),
    ),
    "timm's ConvNeXt": Guest(
        functools.partial(of_timm, "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 32), conv_mlp=False),
        image_loss,
        "timm",
        8,
        PaCAConfig(r=2, modules_to_save=["head.fc"]),
    ),
    "a vision transformer built as torchvision's": Guest(
        BareViT, image_loss, "torch", 4, PaCAConfig(r=2, modules_to_save=["heads"])
    ),
}
