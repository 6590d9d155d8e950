"""Tiny models of images, and of images with text."""

from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

IDS = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(4))
CLASSES = torch.arange(8) % 5
END, IMAGE = 2, 63
"""Tokens of the end of a text, and of a patch of an image."""
UNREAD = r".*vision_tower\.encoder\.layers\.1\..*"
"""LLaVA reads the vision tower before its last block, which therefore gets no gradient."""
UNREAD_LAYERS = tuple(
    f"model.vision_tower.encoder.layers.1.{name}"
    for name in (*(f"self_attn.{own}" for own in ("k_proj", "v_proj", "q_proj", "out_proj")), "mlp.fc1", "mlp.fc2")
)
IDS[:, -1] = END
BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PATCHES = {"image_size": 32, "patch_size": 16}


def vit() -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.ViTForImageClassification(hf.ViTConfig(**BLOCKS, **PATCHES, **dropout, num_labels=5))


def clip() -> nn.Module:
    text = {**BLOCKS, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": END}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config={**BLOCKS, **PATCHES}, projection_dim=16))


def llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(**BLOCKS, **PATCHES)
    text = hf.LlamaConfig(**BLOCKS, vocab_size=64, num_key_value_heads=2)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )


def class_loss(model: Any, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(pixel_values=IMAGES[rows]).logits, CLASSES[rows])


def pair_loss(model: Any, rows: Tensor) -> Tensor:
    """That each text finds its image, and the other way round."""
    return model(input_ids=IDS[rows], pixel_values=IMAGES[rows], return_loss=True).loss


def answer_loss(model: Any, rows: Tensor) -> Tensor:
    """Of the text behind an image of four patches."""
    patches = torch.full((len(rows), 4), IMAGE)
    labels = torch.cat([torch.full_like(patches, -100), IDS[rows]], 1)
    ids = torch.cat([patches, IDS[rows]], 1)
    return model(input_ids=ids, pixel_values=IMAGES[rows], labels=labels).loss
