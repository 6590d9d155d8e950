"""Output heads: the linear layers whose output is a model's, found by what the model says, by name, shape and place.

The head of a language model is as pretrained as its blocks. A head over classes is new for most tasks, and is trained
whole or not at all: some of its columns would be of little use beside random ones.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from paca_lightning.core.paths import lies_in

# Attribute names of output heads, for models that do not tell and are not built from repeated blocks.
HEADS = {"lm_head", "head", "classifier", "score"}


@dataclass
class Heads:
    """The output heads of a model.

    Attributes:
        all: All of them.
        over_classes: Those that are not over a vocabulary of the model.
    """

    all: set[nn.Module] = field(default_factory=set)
    over_classes: set[nn.Module] = field(default_factory=set)


def is_base_model(module: nn.Module) -> bool:
    """Whether a module is a Hugging Face model."""
    return hasattr(module, "get_output_embeddings") and hasattr(module, "config")


def find_heads(modules: Mapping[str, nn.Module]) -> Heads:
    """Find the output heads of a model.

    Args:
        modules: All modules by path, in the order in which they were registered.
    """
    tree = _Tree(modules)
    heads = Heads()
    over_vocabulary: set[nn.Module] = set()
    for path, module in modules.items():
        if isinstance(embeddings := _output_embeddings(module), nn.Module):
            over_vocabulary.add(embeddings)
        elif path.rpartition(".")[2] == "lm_head":
            over_vocabulary.add(module)
        elif is_base_model(module):
            heads.all.update(tree.modules[name] for name in tree.heads_of_hugging_face(path))
        if path.rpartition(".")[2] in HEADS:
            heads.all.update((module, *(tree.modules[name] for name in tree.linears_in(path)[-1:])))
        heads.all.update(_classifiers_of_timm(module))
    heads.all.update(tree.modules[name] for name in tree.last_linears())
    heads.all |= over_vocabulary
    heads.over_classes = {
        head
        for head in heads.all - over_vocabulary
        if isinstance(head, nn.Linear) and (head.out_features, head.in_features) != tree.vocabulary
    }
    return heads


def names_to_save(modules: Mapping[str, nn.Module], heads: set[nn.Module]) -> list[str]:
    """What to list in ``modules_to_save`` to train some heads whole: a module around several of them, or the head.

    Args:
        modules: All modules by path.
        heads: Some linear layers.
    """
    names: dict[str, None] = {}
    for path in (path for path, module in modules.items() if module in heads):
        parent = path.rpartition(".")[0]
        inside = [m for name, m in modules.items() if isinstance(m, nn.Linear) and parent and lies_in(name, parent)]
        names[parent if len(inside) > 1 and set(inside) <= heads else path] = None
    return list(names)


class _Tree:
    """Paths of a model's linear layers and of its repeated blocks."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.order = {path: number for number, path in enumerate(modules)}
        self.linears = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
        self.blocks = {block for path, module in modules.items() for block in _repeated_blocks(path, module)}
        self.around_blocks = {ancestor for block in self.blocks for ancestor in _ancestors(block)}
        self.hugging_face = {path for path, module in modules.items() if is_base_model(module)}
        tables = [(m.num_embeddings, m.embedding_dim) for m in modules.values() if isinstance(m, nn.Embedding)]
        self.vocabulary = max(tables, default=None)  # the others are of positions or kinds of tokens
        self.outside = [path for path in self.linears if not any(parent in self.blocks for parent in _ancestors(path))]
        self._ends_of: dict[str, tuple[str, int]] = {}  # found once for each network: models may have many layers

    def linears_in(self, path: str) -> list[str]:
        return [name for name in self.linears if lies_in(name, path)]

    def heads_of_hugging_face(self, path: str) -> list[str]:
        """Linear layers behind the base model of a Hugging Face model with a head over classes, or the head itself."""
        model = self.modules[path]
        outside = [name for name in self.outside if lies_in(name, path)]
        base = getattr(model, "base_model", model)
        if base is not model:
            inside = set(base.modules())
            return [name for name in outside if self.modules[name] not in inside]
        labels = getattr(model.config, "num_labels", None)
        return [name for name in outside[-1:] if self._ends(name, path) and self._linear(name).out_features == labels]

    def last_linears(self) -> Iterator[str]:
        """Linear layers that end a network of repeated blocks, and whose output fits no other layer of it."""
        for name in self.outside:
            ancestors = list(_ancestors(name))
            if any(parent in self.hugging_face for parent in ancestors):
                continue
            network = next((ancestor for ancestor in ancestors if ancestor in self.around_blocks), None)
            if network is not None and self._ends(name, network):
                widths = {self._linear(other).in_features for other in self.linears_in(network) if other != name}
                if self._linear(name).out_features not in widths:
                    yield name

    def _ends(self, name: str, network: str) -> bool:
        """Whether a linear layer is the last one of a network, and comes after its blocks."""
        if network not in self._ends_of:
            # A block that is shared counts where it stands first.
            inside = [self.order[block] for block in self.blocks & self.order.keys() if lies_in(block, network)]
            last_block = max(inside, default=-1)
            self._ends_of[network] = self.linears_in(network)[-1], last_block
        last, last_block = self._ends_of[network]
        return last == name and self.order[name] > last_block

    def _linear(self, name: str) -> nn.Linear:
        module = self.modules[name]
        assert isinstance(module, nn.Linear)
        return module


def _output_embeddings(module: nn.Module) -> object:
    if not hasattr(module, "get_output_embeddings"):
        return None
    try:
        return module.get_output_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # some Hugging Face models say so that they have none
        return None


def _classifiers_of_timm(module: nn.Module) -> Iterator[nn.Module]:
    """What a model of timm, or one with its interface, calls its classifier; several if it was distilled."""
    if not (hasattr(module, "get_classifier") and hasattr(module, "reset_classifier")):
        return
    found = module.get_classifier()  # type: ignore[operator]
    for head in found if isinstance(found, tuple | list) else (found,):
        if isinstance(head, nn.Module):
            yield from (part for part in head.modules() if isinstance(part, nn.Linear))


def _repeated_blocks(path: str, module: nn.Module) -> Iterator[str]:
    """Paths of a list's children whose class occurs several times in it, and that have children themselves."""
    if isinstance(module, nn.ModuleList | nn.Sequential):
        classes = [type(child) for child in module]
        for name, child in module.named_children():
            if classes.count(type(child)) > 1 and next(child.children(), None) is not None:
                yield f"{path}.{name}" if path else name


def _ancestors(path: str) -> Iterator[str]:
    """The paths above one, the nearest first, down to the root's empty one."""
    while path:
        path = path.rpartition(".")[0]
        yield path
