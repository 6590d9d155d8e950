"""Time and memory of a training step with each method, over the floor's: the measurement of ``bench``."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import replacing
from paca_lightning.layers.base import paca_layers
from paca_lightning.tools.bench.measure import Timing, time_methods
from paca_lightning.tools.bench.methods import FLOOR
from paca_lightning.tools.bench.methods import Method as BenchMethod
from paca_lightning.tools.bench.processes import in_fresh_processes
from paca_lightning.tools.bench.workload import Workload
from paca_lightning.tools.compare.methods import FloorMethod, Method
from paca_lightning.tools.compare.runs import MethodRuns
from paca_lightning.tools.compare.task import Task

PRECISIONS = {"32-true": "fp32", "32": "fp32", "bf16-true": "bf16", "16-true": "fp16", "None": "fp32"}
"""Lightning's precisions that ``bench`` knows."""

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class CostMethod:
    """A method of a comparison, as ``bench`` takes it.

    Attributes:
        method: How the model is trained.
        paca: What the run's own PaCAStrategy says.
    """

    method: Method
    paca: PaCAConfig

    floor = FLOOR

    @property
    def title(self) -> str:
        """The method's label."""
        return self.method.label

    label = title

    def __hash__(self) -> int:
        return hash(self.method)

    def apply(self, base: nn.Module) -> nn.Module:
        """A model for this method; weights that it neither trains nor writes are those of the base model."""
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in base.parameters()}
        probe = self.method.apply(copy.deepcopy(base, memo=dict(empty)), self.paca)
        changed = {id(p) for p in probe.parameters() if p.requires_grad}
        changed |= {id(layer.base) for _, layer in paca_layers(probe)}
        shared = {id(p): p for p in base.parameters() if id(empty[id(p)]) not in changed}
        return self.method.apply(copy.deepcopy(base, memo=dict(shared)), self.paca)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """The method's optimizer."""
        return self.method.optimizer(model)


def measure(task: Task, runs: Sequence[MethodRuns], steps: int, threads: int) -> dict[str, Timing]:
    """Time the steps of all methods in turns, in a fresh process.

    Args:
        task: Of all the methods.
        runs: Their runs, of which one at least is finished: it tells the shape of a batch.
        steps: Timed steps of each method.
        threads: CPU threads.

    Returns:
        Figures by label; those of the floor as ``floor``.

    Raises:
        PaCAError: If the run is none that ``bench`` can measure.
    """
    shape = next(result["batch_shape"] for one in runs for trial in one.reported if (result := trial.result))
    workload = workload_of(task, shape, threads)
    chosen = [CostMethod(one.method, task.paca) for one in runs if not isinstance(one.method, FloorMethod)]
    timings = in_fresh_processes(time_methods, workload, [BenchMethod(FLOOR), *chosen], steps, device=workload.device)
    return {method.title: timing for method, timing in timings.items()}


def workload_of(task: Task, batch_shape: Sequence[int], threads: int) -> Workload:
    """A training step of the task's model on random tokens, in the shape of its batches.

    Raises:
        PaCAError: If it is none of a Hugging Face causal language model with token ids, or of mixed precision.
    """
    settings, trainer = dict(task.module.hparams), task.settings["trainer"]
    if "model" not in settings or len(batch_shape) != 2 or not type(task.model).__name__.endswith("ForCausalLM"):
        raise PaCAError("only steps of CausalLMModule, or of a module like it, can be measured")
    if (precision := PRECISIONS.get(str(trainer["precision"]))) is None:
        raise PaCAError(f"precision={trainer['precision']!r} is not measured, only true precisions")
    dtype = DTYPES[next(task.model.parameters()).dtype] if precision == "fp32" else precision
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return Workload(
        model=settings["model"],
        pretrained=settings.get("pretrained", True),
        dtype=dtype,
        attention=settings.get("attn_implementation"),
        batch=batch_shape[0],
        tokens=batch_shape[1],
        checkpointing=settings.get("activation_checkpointing", False),
        device="cpu" if accelerator is None or trainer["accelerator"] == "cpu" else accelerator.type,
        threads=threads,
    )


def cached(path: Path, key: dict[str, Any], measure_now: Callable[[], dict[str, Timing]]) -> dict[str, Timing]:
    """Figures that were measured earlier for the same key, or those of now.

    Args:
        path: JSON file that keeps them.
        key: What they depend on.
        measure_now: Measures them.
    """
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return {label: Timing(**figures) for label, figures in kept["costs"].items()}
    costs = measure_now()
    content = {"key": key, "costs": {label: asdict(timing) for label, timing in costs.items()}}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return costs
