"""The command ``bench``: time and memory of PaCA and other methods on one model, measured."""

import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from paca_lightning.core.dtypes import short_dtype
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.transformers import attention_of
from paca_lightning.tools.bench.measure import WARM_UP, Timing, time_methods
from paca_lightning.tools.bench.methods import QUANTIZED, Method, parse_methods, stacked_experts
from paca_lightning.tools.bench.paper import PAPER, NotEnoughMemoryError, compare_with_paper
from paca_lightning.tools.bench.peak import check_budget, is_measurable, longest_sequence, peak_bytes
from paca_lightning.tools.bench.processes import in_fresh_processes
from paca_lightning.tools.bench.results import Row, open_output, print_table, write_results
from paca_lightning.tools.bench.workload import Workload
from paca_lightning.tools.environment import describe_environment


def bench(
    model: str | None = None,
    preset: str | None = None,
    layers: int | None = None,
    methods: list[str] | str = "floor,paca,lora",
    r: list[int] | int | str = 16,
    match: str = "both",
    batch: int = 2,
    tokens: int = 512,
    dtype: str = "bf16",
    steps: int = 20,
    accumulate: int = 1,
    checkpointing: bool | Literal["selective"] = False,
    compile: bool = False,
    attention: str | None = None,
    liger: bool = False,
    device: str = "auto",
    devices: int = 1,
    threads: int | None = None,
    max_length: str | None = None,
    output: str | None = None,
) -> list[Row]:
    """Measure the time and memory of fine-tuning methods on one model, side by side.

    Every method trains the same layers of the same model on the same random tokens, with the same attention and loss.
    The methods take their steps in turns, in one process. The floor is always among them: a model in which nothing is
    trained, but gradients flow to the first layer's input. No step can cost less. Methods on an NF4 base are compared
    with qfloor, the floor on bitsandbytes' frozen NF4 layers, and qfloor is compared with the floor.

    Args:
        model: Hugging Face model: a local directory or a hub id. Give this or --preset.
        preset: A known shape with random weights: small, small-moe (a mixture of experts), llama3-8b or llama3.1-70b.
            paper: the paper's comparison on Llama-3-8B, its figures beside ours (on a CPU with one layer, unless
            --layers says otherwise). It sets --methods and --batch itself.
        layers: Use this many layers, the first ones. Default: all.
        methods: Names with commas between them: floor, paca, full, PEFT's lora and dora (no dropout, adapters in fp32
            as is PEFT's default), lora-narrow (adapters in --dtype). On an NF4 base: qfloor, qpaca and qlora. A name
            may carry a rank and its own checkpointing: paca:16, lora:8, paca:16+selective, floor+blocks.
        r: Rank, or ranks with commas between them, of methods whose name carries none.
        match: What LoRA and DoRA share with PaCA: rank, parameters (about as many trained ones), or both, in two rows.
        batch: Sequences in a micro-batch.
        tokens: Length of a sequence.
        dtype: Of weights and computation: bf16, fp16 or fp32, or PyTorch's names of these.
        steps: Timed steps of each method, after a warm-up.
        accumulate: Micro-batches in an optimizer step.
        checkpointing: Recompute each block in the backward, with every method. selective: keep the outputs of GEMMs
            and attention, recompute the rest.
        compile: Compile the blocks with torch.compile.
        attention: Attention of all methods, as transformers names it: sdpa, flash_attention_2, eager, ...
        liger: Give all methods Liger's kernels for norms and activations. It needs a GPU.
        device: cpu, cuda, ...; auto is the accelerator if there is one.
        devices: How many devices (on the CPU: processes) train together, with DDP. Figures are rank 0's; tokens per
            second are of all ranks.
        threads: CPU threads of each process. Default: PyTorch's.
        max_length: Memory of one device, such as 24GiB: also find the longest sequence that fits, by trying.
        output: Directory for bench.json, bench.csv and bench.png.

    Returns:
        One row of figures for each method, as in bench.json.

    Raises:
        PaCAError: If an argument is outside its range, a method needs a package that is not installed, or a method
            needs more memory than there is.
    """
    if threads is not None and threads >= 1:
        torch.set_num_threads(threads)
    step: dict[str, Any] = {"tokens": tokens, "dtype": short_dtype(dtype), "checkpointing": checkpointing}
    step |= {"compile": compile, "attention": attention, "liger": liger, "device": _find_device(device, devices)}
    if preset == PAPER:
        options = step | {"steps": steps, "devices": devices, "threads": threads}
        directory = None if output is None else open_output(output)
        return compare_with_paper(bench, options, model, layers, max_length, directory)
    workload = Workload(
        model=model,
        preset=preset,
        layers=layers,
        batch=batch,
        accumulate=accumulate,
        ranks=devices,
        threads=torch.get_num_threads() if threads is None else threads,
        **step,
    )
    if steps < 1:
        raise PaCAError(f"steps must be at least 1, not {steps}.")
    skeleton = workload.skeleton()
    chosen = parse_methods(_entries(methods), _ranks(r), match, skeleton)
    _warn_of_frozen_experts(chosen, skeleton, workload.dtype)
    for method in chosen:
        method.apply(skeleton)  # finds a rank that is too large, and a missing package, before anything is measured
    if max_length is not None:
        check_budget(workload, max_length)
    directory = None if output is None else open_output(output)
    rows = _measure(workload, chosen, steps, max_length)
    setup = _setup(workload, steps, max_length, rows)
    print_table(rows, setup["title"])
    if directory is not None:
        for path in write_results(rows, setup, directory):
            print(path)
    return rows


def _warn_of_frozen_experts(methods: list[Method], skeleton: nn.Module, dtype: str) -> None:
    """Say that methods on an NF4 base train less than the others."""
    if any(method.name in QUANTIZED for method in methods) and (experts := stacked_experts(skeleton)):
        warnings.warn(
            f"Methods on an NF4 base leave stacked experts frozen in {dtype} ({experts[0]!r} is one of {len(experts)} "
            "weights). The others train them.",
            stacklevel=3,
        )


def _measure(workload: Workload, methods: list[Method], steps: int, max_length: str | None) -> list[Row]:
    """Peaks, longest sequences if ``max_length`` asks for them, and step times; one row for each method."""
    with Console(stderr=True).status("") as status:
        # Memory first: the processes that measure it want the machine's memory for themselves.
        peaks = [_peak(workload, method, status.update) for method in methods]
        lengths = []
        for method in methods if max_length is not None else ():
            status.update(f"{method.label}: longest sequence in {max_length}")
            lengths.append(longest_sequence(workload, method, str(max_length)))
        if workload.ranks == 1:
            timings = time_methods(workload, methods, steps, status.update)
        else:
            status.update(f"{workload.ranks} processes take {steps} steps with each method")
            timings = in_fresh_processes(
                time_methods, workload, methods, steps, ranks=workload.ranks, device=workload.device
            )
    rows = [_row(method, timings[method], peak) for method, peak in zip(methods, peaks, strict=True)]
    for row, length in zip(rows, lengths, strict=False):
        row["max_tokens"] = length
    return rows


def _peak(workload: Workload, method: Method, progress: Callable[[str], None]) -> int | None:
    """Bytes at the peak of training; None if they cannot be measured."""
    if not is_measurable(workload):
        return None
    progress(f"{method.label}: peak memory in a fresh process")
    peak = peak_bytes(workload, method)
    if peak == float("inf"):
        raise NotEnoughMemoryError(
            f"{method.label} needs more memory than this machine has, at {workload.batch} x {workload.tokens} tokens. "
            "Leave it out, or use fewer --tokens, fewer --layers or --checkpointing."
        )
    return int(peak)


def _row(method: Method, timing: Timing, peak: int | None) -> Row:
    figures = asdict(timing) | {"peak_bytes": peak, "noisy": timing.noisy}
    return {"method": method.title, "r": method.r, "floor": method.floor, **figures}


def _setup(workload: Workload, steps: int, max_length: str | None, rows: list[Row]) -> dict[str, Any]:
    """What was measured, how, and on which machine, to be kept beside the figures."""
    name = workload.preset or Path(str(workload.model)).name
    config = workload.config
    shape = f"{name}, {config.num_hidden_layers} layers, {workload.dtype}, {workload.batch} x {workload.tokens} tokens"
    options = [
        f"{workload.accumulate} micro-batches" if workload.accumulate > 1 else "",
        {True: "checkpointing", "selective": "selective checkpointing"}.get(workload.checkpointing, ""),
        "compiled" if workload.compile else "",
        workload.attention or "",
        "liger" if workload.liger else "",
        f"{workload.ranks} ranks" if workload.ranks > 1 else "",
    ]
    return describe_environment() | {
        "title": ", ".join([shape, *filter(None, options), _device_name(workload)]),
        "command": shlex.join(sys.argv),
        "workload": asdict(workload),
        "attention": attention_of(config),
        "steps": steps,
        "warm_up_steps": WARM_UP,
        "max_length": max_length,
        "noisy": any(row["noisy"] for row in rows),
        "peak_memory_of": "allocator" if workload.device != "cpu" else "process, less what it held before the model",
    }


def _device_name(workload: Workload) -> str:
    if workload.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{workload.threads} CPU threads" if workload.device == "cpu" else workload.device


def _find_device(device: str, count: int) -> str:
    """The type of device to use, if this machine has as many as are asked for."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    available = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    if device == "auto":
        device = available[-1]
    if device not in available:
        raise PaCAError(f"device={device!r} is not available here. Available: {', '.join(available)}.")
    if device != "cpu" and count > torch.accelerator.device_count():
        raise PaCAError(f"devices={count}, but this machine has {torch.accelerator.device_count()}.")
    return device


def _entries(values: list[str] | str) -> list[str]:
    """The entries of a list, or of a text with commas between them."""
    entries = values.split(",") if isinstance(values, str) else values
    return [entry.strip() for entry in entries]


def _ranks(values: list[int] | int | str) -> list[int]:
    """The ranks in a list, a number, or a text with commas between them."""
    entries = values.split(",") if isinstance(values, str) else values if isinstance(values, list) else [values]
    try:
        ranks = [int(entry) for entry in entries]
    except ValueError as error:
        raise PaCAError(f"r={values!r} is not a rank or a list of ranks such as 8,16.") from error
    if not ranks or min(ranks) < 1:
        raise PaCAError(f"r={values!r}: ranks must be positive.")
    return ranks
