"""docs/works-with.md: one row for each test of a guest. ``python -m tests.guests.page`` writes it."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conversion.test_optimizers import KINDS
from tests.guests.models import MODELS
from tests.guests.test_callbacks import CALLBACKS
from tests.guests.test_trainers import TRAINERS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "works-with.md"
ALL_FOUR = "Each was fitted, resumed bitwise, saved and loaded as an adapter, and merged"
LEFT = "the report names all that stays frozen"

HEADER = """# Works with

What the test suite tries on a CPU, with the versions below. Each row is one test; a row that names none is a case of
the test above its table. This page is generated from the tests: `python -m tests.guests.page` writes it, and a test
fails when it is out of date. What is not listed was not tried; on GPUs nothing here was.
"""

# Tests elsewhere whose rows belong here.
OTHER_TRAINERS = [
    (
        "Hugging Face's Trainer on two processes (DDP)",
        "equal to one process",
        "test_two_ranks_train_alike_and_as_one_process",
    ),
    (
        "Hugging Face's Trainer: bf16, fp16, evaluation in both, accumulation, activation checkpointing",
        "fit, evaluation",
        "test_settings_of_the_trainer",
    ),
]
STRATEGIES = [
    (
        "`ddp` on two processes",
        "equal to one process, resume bitwise",
        "test_ddp_equals_one_process_and_resumes_bitwise",
    ),
    ("`paca_fsdp2` on two ranks", "equal to one process", "test_two_ranks_equal_one_process"),
    (
        "`paca_fsdp2` on two ranks, with a new head over labels",
        "equal to one process",
        "test_two_sharded_ranks_train_a_head_as_one_process",
    ),
    (
        "`paca_fsdp2` on two ranks, with embeddings",
        "equal to the equation on each micro-batch",
        "test_two_sharded_ranks_train_what_the_equation_says_of_each_micro_batch",
    ),
    ("`paca_fsdp2` on four ranks", "equal to one process", "test_four_ranks_equal_one_process"),
    ("`paca_fsdp2`, then one device, and back", "resume", "test_resume_a_file_on_a_single_device_and_back"),
    (
        "`paca_fsdp2` on two ranks, with stacked experts (Mixtral, Qwen3-MoE, DeepSeek-V3, GPT-OSS)",
        "equal to one process",
        "test_experts_on_two_ranks_train_as_on_one",
    ),
    (
        "`paca_fsdp2`, from files that hold each expert by itself (Mixtral, DeepSeek-V2)",
        "equal to from_pretrained",
        "test_each_rank_fills_its_experts",
    ),
    ("`hpu_ddp` on two simulated cards", "equal to one CPU", "test_two_cards_compute_what_one_cpu_computes"),
    ("every precision of Lightning on a CPU", "fit", "test_precisions"),
]
OTHER_CALLBACKS = [
    (
        "BackboneFinetuning of a backbone that PaCA leaves alone",
        "fit, resume bitwise, what it thaws is in checkpoints and adapters",
        "test_a_backbone_that_is_thawed_later_is_saved_and_given_back",
    ),
    (
        "BackboneFinetuning of layers that PaCA trains",
        "refused before training",
        "test_a_backbone_of_which_paca_trains_columns_is_not_thawed",
    ),
    ("ModelPruning of other layers", "fit", "test_pruning_another_layer_is_none_of_pacas_business"),
    (
        "ModelPruning of layers that PaCA trains",
        "refused before training",
        "test_pruning_a_layer_that_paca_trains_is_refused",
    ),
]
TRANSFORMS = [
    (
        "`torch.func.functional_call` with other deltas",
        "equal to plain torch, to second order",
        "test_another_delta_is_differentiated_to_second_order",
    ),
    ("`torch.func.vmap` over deltas", "equal to plain torch", "test_several_deltas_at_once"),
    ("`torch.func.grad`, gradients per sample", "equal to plain torch", "test_gradients_per_sample"),
    ("`jvp`, `jacrev`, forward-mode AD", "equal to plain torch", "test_maps_and_jacobians_of_the_input"),
    ("`torch.jit.trace`, with gradients", "equal to the layer", "test_a_traced_layer_trains"),
    ("`torch.compile(fullgraph=True)`", "equal to a plain layer", "test_parity_with_the_default_compiler"),
    ("jagged inputs", "equal to the layer on the values", "test_jagged_gradients"),
    (
        "a backward with `create_graph=True` through a layer that trains",
        "refused in that backward; `functional_call` has it",
        "test_a_second_derivative_of_a_layer_that_trains_is_refused",
    ),
    ("`call_for_per_sample_grads` (ExpandedWeight)", "refused in the forward", "test_expanded_weights_are_refused"),
    (
        "`functional_call` with another `nn.Parameter` for the delta, whose weight does not fit",
        "refused in the forward",
        "test_another_parameter_is_refused_without_its_weight",
    ),
    (
        "two Parameters on one storage",
        "left frozen, and named",
        "test_two_parameters_on_one_memory_are_tied",
    ),
    (
        "weights that are tied after the conversion",
        "refused before training",
        "test_weights_that_are_tied_after_the_conversion_are_refused",
    ),
    (
        "parametrizations and pruning masks before the conversion",
        "left frozen, and named",
        "test_all_linear_leaves_alone_what_it_must_and_says_why",
    ),
    (
        "the same after the conversion",
        "refused before training, or at the next step",
        "test_a_parametrization_after_the_conversion_is_refused",
    ),
    (
        "layers whose weight is read without a call",
        "left frozen, and named",
        "test_layers_that_are_read_and_never_called_are_left_alone",
    ),
]
UNTRIED = "files as its source writes them, not PEFT itself: 0.22 was not on the registry in November 2026"
ADAPTERS = [
    ("PEFT's PaCA (0.22), to ours", f"bitwise; {UNTRIED}", "test_an_adapter_of_peft_means_its_columns"),
    ("ours to PEFT's PaCA (0.22)", f"equal; {UNTRIED}", "test_an_export_computes_the_same_in_peft"),
    (
        "PEFT's PaCA itself, in both directions",
        "skipped until PEFT 0.22 is installed",
        "test_what_peft_trained_computes_the_same_here",
    ),
    (
        "the fork of PEFT by PaCA's authors (`paca_w`), to ours",
        "bitwise in bf16; files as its source writes them",
        "test_an_adapter_of_the_fork_means_its_columns_bitwise_in_bf16",
    ),
    ("ours as LoRA, to PEFT", "equal", "test_a_lora_adapter_of_a_bf16_model_is_exact"),
]
OTHER_OPTIMIZERS = [
    ("SAM in manual optimization, through Lightning's wrapper", "test_sam_through_lightnings_wrapper"),
    ("a schedule-free optimizer in Fabric", "test_a_schedule_free_optimizer_in_fabric"),
    ("schedulefree's AdamWScheduleFree", "test_a_schedule_free_optimizer_of_its_package"),
    ("an optimizer that Accelerate prepared", "test_the_optimizer_that_accelerate_prepares"),
    (
        "Adafactor (PyTorch's, Hugging Face's): a warning where it hardly moves deltas",
        "test_adafactor_moves_deltas_or_warns_that_it_hardly_does",
    ),
]


@dataclass(frozen=True)
class Row:
    """One test.

    Attributes:
        what: The guest.
        library: Whose it is; empty where the section tells.
        tried: What the test does with it; what the section's does not tell.
        test: Name of the function; empty for a case of the section's test.
    """

    what: str
    library: str = ""
    tried: str = ""
    test: str = ""


@dataclass(frozen=True)
class Section:
    """A table.

    Attributes:
        title: Its heading.
        rows: Its rows.
        tried: What the test of most rows does, as a sentence.
        test: Name of that test; empty if each row has one of its own.
    """

    title: str
    rows: list[Row]
    tried: str = ""
    test: str = ""


def sections() -> Iterator[Section]:
    """The tables."""
    models = [Row(name, guest.library, LEFT if guest.left is not None else "") for name, guest in MODELS.items()]
    yield Section("Models, in a LightningModule", models, ALL_FOUR, "test_a_model_is_fitted_resumed_saved_and_merged")
    rows = [Row(name, library) for name, (_, library) in TRAINERS.items()]
    rows += [Row(name, "transformers", tried, test) for name, tried, test in OTHER_TRAINERS]
    yield Section("Loops and trainers", rows, ALL_FOUR, "test_a_trainer_fits_resumes_saves_and_merges")
    rows = [Row(name) for name in CALLBACKS] + _rows(OTHER_CALLBACKS)
    yield Section("Lightning's callbacks", rows, "Each was fitted beside PaCAStrategy", "test_a_callback_beside_paca")
    yield Section("Strategies and precisions", _rows(STRATEGIES))
    yield Section("Adapters of other programs", _rows(ADAPTERS))
    rows = [Row(name) for name in KINDS]
    rows += [Row(name, "", "weights follow the deltas", test) for name, test in OTHER_OPTIMIZERS]
    yield Section(
        "Optimizers",
        rows,
        "Each trains as it trains weights that are a function of the deltas",
        "test_an_optimizer_trains_what_it_trains_in_the_reference",
    )
    yield Section("Transforms of PyTorch, and weights of other kinds", _rows(TRANSFORMS))


def _rows(tests: Iterable[tuple[str, str, str]]) -> list[Row]:
    return [Row(what, "", tried, test) for what, tried, test in tests]


def lines_of(section: Section) -> Iterator[str]:
    """Lines of a section. A column that would be empty is left out."""
    own = any(row.test for row in section.rows)
    yield from (f"## {section.title}", "")
    if section.test:
        others = ", but for rows with a test of their own" if own else ""
        yield from (f"{section.tried} (`{section.test}`){others}.", "")
    cells = [(row.what, row.library, row.tried, f"`{row.test}`" if row.test else "") for row in section.rows]
    # In a table without tests of their own, what is said of a row comes on top of what is said of all.
    header = ("what", "library", "tried" if own else "also", "test")
    shown = [column for column in range(4) if any(row[column] for row in cells)]
    for row in [header, ("---",) * 4, *cells]:
        yield f"| {' | '.join(row[column] for column in shown)} |"
    yield ""


def versions() -> str:
    """The versions of the libraries, from the files that install them for the tests."""
    pinned = (ROOT / "constraints" / "tested.txt").read_text(encoding="utf-8")
    for name in ("Makefile", "constraints/guests.txt"):
        pinned += (ROOT / name).read_text(encoding="utf-8").replace(" ", "\n")
    names = [
        "torch",
        "lightning",
        "transformers",
        "accelerate",
        "peft",
        "trl",
        "litgpt",
        "timm",
        "schedulefree",
        "pytorch-optimizer",
    ]
    found = {name: re.search(rf"^{name}==(\S+)$", pinned, re.M) for name in names}
    missing = [name for name, match in found.items() if match is None]
    assert not missing, f"no version of {missing} is pinned"
    return ", ".join(f"{name} {match[1]}" for name, match in found.items() if match)


def render() -> str:
    """The page."""
    lines = [HEADER, f"Versions: {versions()}.", ""]
    for section in sections():
        lines += lines_of(section)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
