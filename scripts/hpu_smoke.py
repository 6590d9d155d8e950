"""Checks paca_lightning on Intel Gaudi cards and prints a report to paste into an issue.

    python scripts/hpu_smoke.py                 # a few minutes on one host; --help for the sizes

This package has run on a simulated Gaudi only, so every report from a real one is welcome. The script lists the
environment, trains a small random Llama on one card and on all cards, dense and NF4, and compares the losses with the
CPU's. Then it times a step of PaCA and of LoRA. It downloads nothing; the timing needs peft.

Each group of checks runs in a process of its own, so that a crash or a hang does not end the other groups.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = (
    *("paca-lightning", "torch", "lightning", "transformers", "bitsandbytes", "peft"),
    *("habana-torch-plugin", "habana-media-loader", "optimum-habana"),
)
MARK = "HPU_SMOKE "
STEPS = 4
# Relative differences of losses that rounding explains. Those of a wrong computation are much larger.
FP32_TOLERANCE, BF16_TOLERANCE = 1e-3, 3e-2


class Checks:
    """The checks. Each returns what it found, and raises if that is wrong.

    Args:
        options: The command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    # one card

    def environment(self) -> str:
        """Versions, devices, and environment variables that change how they work."""
        import torch

        found = [f"python {platform.python_version()}"]
        for package in PACKAGES:
            try:
                found.append(f"{package} {importlib.metadata.version(package)}")
            except importlib.metadata.PackageNotFoundError:
                found.append(f"{package} -")
        variables = [
            f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(("PT_", "HABANA_"))
        ]
        card = f"{torch.hpu.device_count()} x {torch.hpu.get_device_name()}, {torch.hpu.memory_stats()}"
        return "; ".join([card, ", ".join(found), " ".join(variables)])

    def operators(self) -> str:
        """The operators of PaCA, with static shapes and int64 indices, and whether the one of NF4 exists."""
        import torch

        indices = torch.tensor([1, 3, 6])
        weight, columns = torch.arange(32.0).reshape(4, 8), -torch.ones(4, 3)
        expected = weight.index_copy(-1, indices, columns)
        result = weight.to("hpu").index_copy_(-1, indices.to("hpu"), columns.to("hpu"))
        assert torch.equal(result.cpu(), expected), "index_copy_ differs from the CPU's"
        gathered = result.index_select(-1, indices.to("hpu")).cpu()
        assert torch.equal(gathered, columns), "index_select differs from the CPU's"
        return f"index_copy_, index_select; torch.ops.hpu.dequantize_nf4: {hasattr(torch.ops.hpu, 'dequantize_nf4')}"

    def fp32(self) -> str:
        """A few steps in fp32."""
        return self._compare(FP32_TOLERANCE, precision="32-true")

    def bf16_mixed(self) -> str:
        """A few steps under autocast."""
        return self._compare(BF16_TOLERANCE, precision="bf16-mixed")

    def bf16_true(self) -> str:
        """A few steps with bf16 weights."""
        return self._compare(BF16_TOLERANCE, precision="bf16-true")

    def compiled(self) -> str:
        """A few steps through ``torch.compile(backend="hpu_backend")``."""
        return self._compare(BF16_TOLERANCE, compiled=True, precision="bf16-true")

    def nf4(self) -> str:
        """A few steps on an NF4 base."""
        return self._compare(BF16_TOLERANCE, quantize="nf4", precision="bf16-true")

    # all cards

    def ddp(self) -> str:
        """A copy of the model on every card."""
        return self._compare(FP32_TOLERANCE, devices=-1, strategy="auto", precision="32-true")

    def fsdp2(self) -> str:
        """The model sharded over all cards."""
        return self._compare(FP32_TOLERANCE, devices=-1, strategy="hpu_fsdp2", precision="32-true")

    def fsdp2_nf4(self) -> str:
        """An NF4 base sharded over all cards, as for a 70B model."""
        return self._compare(BF16_TOLERANCE, devices=-1, strategy="hpu_fsdp2", quantize="nf4", precision="bf16-true")

    # timing

    def timing(self) -> str:
        """Milliseconds of a step of PaCA and of LoRA in bf16, eager, measured in turns."""
        steps = {"PaCA r=16": self._paca_step(), "LoRA r=8": self._lora_step()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(3 + self.options.timing_steps):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if turn >= 3:  # after the warm-up
                    times[name].append(1000 * (time.perf_counter() - start))
        best = {name: min(values) for name, values in times.items()}
        ratio = best["LoRA r=8"] / best["PaCA r=16"]
        listed = ", ".join(f"{name} {value:.1f} ms" for name, value in best.items())
        return f"best of {self.options.timing_steps}: {listed}; LoRA / PaCA = {ratio:.2f}"

    # helpers

    def _compare(self, tolerance: float, *, compiled: bool = False, quantize: str | None = None, **options: Any) -> str:
        """Train on HPUs and on the CPU, and compare the losses."""
        on_hpu = _train("hpu", compiled=compiled, quantize=quantize, **({"devices": 1} | options))
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return ""
        on_cpu = _train("cpu", quantize=quantize, devices=1, precision=options["precision"])
        worst = max(abs(a - b) / abs(b) for a, b in zip(on_hpu, on_cpu, strict=True))
        losses = f"losses {[round(loss, 4) for loss in on_hpu]}, largest relative difference from the CPU {worst:.1e}"
        assert worst <= tolerance, f"{losses}, beyond {tolerance}"
        return losses

    def _paca_step(self) -> Callable[[], None]:
        import torch

        from paca_lightning import PaCAConfig, apply_paca, attach

        model = self._timed_model()
        apply_paca(model, PaCAConfig(r=16))
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        attach(optimizer, model)
        return self._step(model, optimizer)

    def _lora_step(self) -> Callable[[], None]:
        import torch
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(self._timed_model(), LoraConfig(r=8, target_modules="all-linear"))
        return self._step(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))

    def _timed_model(self) -> Any:
        import torch

        options = self.options
        return _llama(options.hidden_size, options.layers, 32000, options.length).to("hpu", torch.bfloat16)

    def _step(self, model: Any, optimizer: Any) -> Callable[[], None]:
        import torch

        tokens = torch.randint(32000, (self.options.batch_size, self.options.length)).to("hpu")

        def step() -> None:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.hpu.synchronize()

        return step


GROUPS: dict[str, tuple[Callable[[Checks], str], ...]] = {
    "one card": (
        *(Checks.environment, Checks.operators, Checks.fp32, Checks.bf16_mixed, Checks.bf16_true),
        *(Checks.compiled, Checks.nf4),
    ),
    "all cards": (Checks.ddp, Checks.fsdp2, Checks.fsdp2_nf4),
    "timing": (Checks.timing,),
}


def _llama(hidden_size: int, layers: int, vocabulary: int, length: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 64),
        num_key_value_heads=max(1, hidden_size // 128),
        vocab_size=vocabulary,
        max_position_embeddings=length,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def _train(accelerator: str, *, compiled: bool = False, quantize: str | None = None, **options: Any) -> list[float]:
    """Train a small Llama for a few steps. Returns the losses, each the mean over all ranks."""
    import lightning.pytorch as pl
    import torch

    from paca_lightning import PaCAConfig, PaCAStrategy

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = _llama(hidden_size=128, layers=2, vocabulary=256, length=64)
            self.losses: list[float] = []

        def configure_model(self) -> None:
            if compiled:
                self.model.compile(backend="hpu_backend")

        def training_step(self, batch: torch.Tensor, batch_index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
            self.losses.append(self.trainer.strategy.reduce(loss.detach().float().clone(), reduce_op="mean").item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)

    tokens = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(1))
    module = Module()
    trainer = pl.Trainer(
        accelerator=accelerator,
        max_steps=STEPS,
        callbacks=PaCAStrategy(PaCAConfig(r=8, quantize=quantize)),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # every rank trains on the same batch, which one CPU process can repeat
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(tokens.repeat(STEPS, 1), batch_size=2))
    return module.losses


def run_group(group: str, options: argparse.Namespace) -> None:
    """Run a group's checks in this process, and print each result as a line for :func:`collect`."""
    from paca_lightning.strategies.hpu.bridge import require_hpu

    warnings.filterwarnings("ignore")
    require_hpu()
    checks = Checks(options)
    for check in GROUPS[group]:
        start = time.perf_counter()
        try:
            result = {"ok": True, "detail": check(checks)}
        except Exception as error:
            result = {"ok": False, "detail": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        if os.environ.get("LOCAL_RANK", "0") == "0":
            seconds = time.perf_counter() - start
            print(f"\n{MARK}{json.dumps(result | {'check': check.__name__, 'seconds': seconds})}", flush=True)


def collect(group: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run a group in a process of its own. Checks that it did not reach fail with the end of its output."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--group", group]
    process = subprocess.Popen(  # noqa: S603  (this script itself)
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=options.timeout)
        end = f"ended with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # and the ranks that it launched
        output, _ = process.communicate()
        end = f"did not end within {options.timeout} s"
    lines = output.splitlines()
    results = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    reached = {result["check"] for result in results}
    tail = "\n".join(lines[-40:])
    return results + [
        {"check": check.__name__, "ok": False, "detail": f"not reached: the process {end}", "trace": tail, "seconds": 0}
        for check in GROUPS[group]
        if check.__name__ not in reached
    ]


def main() -> int:
    """Run all groups and print the report. Returns the number of checks that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=2048, help="hidden size of the timed model")
    parser.add_argument("--layers", type=int, default=8, help="layers of the timed model")
    parser.add_argument("--length", type=int, default=512, help="tokens of a timed sequence")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a timed step")
    parser.add_argument("--timing-steps", type=int, default=10, help="timed steps of each method")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds that a group of checks may take")
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.group:
        run_group(options.group, options)
        return 0

    print("# paca_lightning on Gaudi\n\n| check | result | seconds | |\n|---|---|---|---|", flush=True)
    failed = []
    for group in GROUPS:
        for result in collect(group, options):
            verdict = "ok" if result["ok"] else "**FAILED**"
            detail = str(result["detail"]).replace("\n", " ").replace("|", "/")
            print(f"| {group}: {result['check']} | {verdict} | {result['seconds']:.0f} | {detail} |", flush=True)
            failed += [] if result["ok"] else [result]
    for result in failed:
        print(f"\n<details><summary>{result['check']}</summary>\n\n```\n{result['trace']}\n```\n</details>")
    print(f"\n{len(failed)} check(s) failed." if failed else "\nAll checks passed.")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
