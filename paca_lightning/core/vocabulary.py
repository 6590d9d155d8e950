"""Room for new tokens in a model's embeddings: spare rows where there are some, or else more rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import NewTokens, declare_new_tokens, declared_new_tokens

CHUNK = 4096  # rows that are summed at a time, so that no copy of an embedding is made


@dataclass(frozen=True, eq=False)
class Room:
    """The room that was made for new tokens, which can be taken back.

    Attributes:
        model: The Hugging Face model.
        vocabulary: Rows of its embeddings before.
        spare: What rows held that were there already, in the input embedding and in the output head.
        ids: Numbers of these rows.
    """

    model: Any
    vocabulary: int
    spare: tuple[Tensor, Tensor]
    ids: list[int]

    def take_back(self) -> None:
        """Make the embeddings bitwise what they were."""
        _resize(self.model, self.vocabulary)
        for end, values in zip(ends_of(self.model), self.spare, strict=True):
            _put_rows(end, self.ids, values)
        declare_new_tokens(self.model, None)


@torch.no_grad()
def make_room(model: Any, new: NewTokens) -> Room:
    """Give each new token a row in the embedding and in the head, the mean of all rows before, and declare the tokens.

    Rows that the model has beyond its vocabulary are used first. The mean is summed in fp64, so that it hardly depends
    on the machine. On the meta device there are no values.

    Args:
        model: A causal language model of transformers, neither converted nor sharded.
        new: The tokens.

    Raises:
        PaCAError: If it has new tokens already, another vocabulary, or an embedding or a head of an unusual kind. The
            model is then as it was.
    """
    if (before := declared_new_tokens(model)) is not None:
        raise PaCAError(f"The model has new tokens already: {', '.join(map(repr, before.tokens))}. Add all at once.")
    embedding, head = _checked_ends(model, new)
    if (rows := embedding.num_embeddings) != new.vocabulary:
        raise PaCAError(
            f"The new tokens were added to a model with {new.vocabulary:,} embeddings, and this one has {rows:,}. "
            "Take the base model that they were trained on."
        )
    known = [number for number in new.ids if number < rows]
    room = Room(model, rows, (embedding.weight[known].clone(), head.weight[known].clone()), known)
    if new.ids[-1] >= rows:
        _resize(model, new.ids[-1] + 1)
    for end, weight in zip(ends_of(model), (embedding.weight, head.weight), strict=True):
        if not weight.is_meta:
            _put_rows(end, new.ids, _mean(weight[: new.ids[0]]).expand(len(new.ids), -1))
    declare_new_tokens(model, new)
    return room


def ends_of(model: Any) -> tuple[nn.Embedding, nn.Linear]:
    """Input embedding and output head of a causal language model; their weight may be one parameter."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def _checked_ends(model: Any, new: NewTokens) -> tuple[nn.Embedding, nn.Linear]:
    embedding, head = ends_of(model)
    problem = _problem_of_embedding(embedding, new) or _problem_of_head(head, new)
    if problem is None:
        ours = {id(embedding.weight), id(head.weight)}
        for path, module in model.named_modules():
            shares = any(id(parameter) in ours for parameter in module.parameters(recurse=False))
            table = isinstance(module, nn.Embedding) and module.num_embeddings == embedding.num_embeddings
            if module not in (embedding, head) and (shares or table):
                problem = f"{path!r} ({type(module).__name__}) goes by the numbers of tokens, too"
                break
    if problem is not None:
        raise PaCAError(f"{type(model).__name__} cannot be given new tokens here: {problem}.")
    return embedding, head


def _problem_of_embedding(embedding: Any, new: NewTokens) -> str | None:
    name = type(embedding).__name__
    if not isinstance(embedding, nn.Embedding):
        return f"its input embedding is a {name}, no nn.Embedding"
    if new.train == "rows" and type(embedding).forward is not nn.Embedding.forward:
        return f"its input embedding, a {name}, does more than look up rows (new_tokens_train: all trains it whole)"
    if embedding.max_norm is not None or embedding.sparse or embedding.scale_grad_by_freq:
        return f"its input embedding, a {name}, has max_norm, sparse or scale_grad_by_freq"
    if embedding.padding_idx in new.ids:
        return f"its input embedding pads with {embedding.padding_idx}, the number of a new token"
    return None


def _problem_of_head(head: Any, new: NewTokens) -> str | None:
    name = type(head).__name__
    if not isinstance(head, nn.Linear):
        return f"its output head is a {name}, no nn.Linear"
    if new.train == "rows" and type(head).forward is not nn.Linear.forward:
        return f"its output head is a {name}, no plain nn.Linear (new_tokens_train: all trains it whole)"
    if new.train == "rows" and head.bias is not None:
        return f"its output head, a {name}, has a bias (new_tokens_train: all trains it whole)"
    return None


def _resize(model: Any, rows: int) -> None:
    """Let transformers change the number of rows; new ones are drawn at random, which moves no random state."""
    embedding, _ = ends_of(model)
    if embedding.num_embeddings == rows:
        return
    device = embedding.weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.resize_token_embeddings(rows, mean_resizing=False)


@torch.no_grad()
def _put_rows(module: nn.Module, ids: Sequence[int], values: Tensor) -> None:
    weight = module.get_parameter("weight")
    weight.index_copy_(0, torch.tensor(ids, dtype=torch.long, device=weight.device), values.to(weight))


def _mean(rows: Tensor) -> Tensor:
    """Mean of rows (N, D) in fp64, shape (D,)."""
    return sum((part.double().sum(0) for part in rows.split(CHUNK)), rows.new_zeros((), dtype=torch.double)) / len(rows)
