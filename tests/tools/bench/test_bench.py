"""The benchmark on a tiny model: its schema, its counts and its refusals. How long steps take is not tested."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from paca_lightning import PaCAError
from paca_lightning.tools.bench.command import bench
from paca_lightning.tools.bench.measure import saved_bytes, time_methods
from paca_lightning.tools.bench.methods import Method, parse_methods
from paca_lightning.tools.bench.peak import longest_sequence, peak_bytes
from paca_lightning.tools.bench.step_runner import StepRunner
from paca_lightning.tools.bench.workload import Workload
from paca_lightning.tools.presets import PRESETS, preset_config
from paca_lightning.tools.units import format_bytes, parse_bytes
from tests.tiny import tiny_config, tiny_llama, tiny_model_directory

LAYERS, HIDDEN, MLP, KEYS = 2, 64, 96, 32
OUT_FEATURES = LAYERS * (HIDDEN + 2 * KEYS + HIDDEN + 2 * MLP + HIDDEN)
IN_FEATURES = LAYERS * (6 * HIDDEN + MLP)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model_directory(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def workload(model: str) -> Workload:
    return Workload(model=model, dtype="fp32", batch=2, tokens=16)


def test_bench_writes_rows_in_the_fixed_schema(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "results"
    rows = bench(
        model=model, methods="paca,lora", r=8, batch=2, tokens=16, dtype="fp32", steps=3, threads=1, output=str(output)
    )
    written = json.loads((output / "bench.json").read_text())

    assert [(row["method"], row["r"]) for row in rows] == [("floor", None), ("paca", 8), ("lora", 8), ("lora", 4)]
    assert json.loads(json.dumps(rows)) == written["rows"]
    fixed = {
        "method",
        "r",
        "step_ms",
        "ratio_to_floor",
        "saved_bytes",
        "peak_bytes",
        "trainable_parameters",
        "tokens_per_second",
    }
    for row in written["rows"]:
        assert fixed <= set(row)
        assert row["step_ms"] > 0
        assert row["peak_bytes"] > 0
        low, high = row["ratio_quartiles"]
        assert low <= row["ratio_to_floor"] <= high
        assert row["tokens_per_second"] == pytest.approx(2 * 16 / row["step_ms"] * 1e3)
    assert written["setup"]["workload"]["tokens"] == 16
    assert written["setup"]["versions"]["torch"]
    with (output / "bench.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["floor", "paca", "lora", "lora"]
    assert (output / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "paca r=8" in capsys.readouterr().out


def test_each_method_trains_what_it_says(workload: Workload) -> None:
    base = workload.build()
    everything = sum(parameter.numel() for parameter in base.parameters())
    expected = {
        Method("floor"): 0,
        Method("paca", 4): 4 * OUT_FEATURES,
        Method("qpaca", 4): 4 * OUT_FEATURES,
        Method("lora", 4): 4 * (OUT_FEATURES + IN_FEATURES),
        Method("lora-narrow", 4): 4 * (OUT_FEATURES + IN_FEATURES),
        Method("qfloor"): 0,
        Method("qlora", 4): 4 * (OUT_FEATURES + IN_FEATURES),
        Method("dora", 4): 4 * (OUT_FEATURES + IN_FEATURES) + OUT_FEATURES,
        Method("full"): everything,
    }
    counted = {method: StepRunner(method, base, workload).trainable_parameters for method in expected}
    assert counted == expected
    assert all(parameter.requires_grad for parameter in Method("full").apply(base).parameters())


def test_training_one_method_leaves_the_base_and_the_other_methods_alone(workload: Workload) -> None:
    base = workload.build()
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    runners = [StepRunner(Method(name, r), base, workload) for name, r in (("paca", 4), ("lora", 4), ("full", None))]
    losses = []
    for runner in runners:
        batch = workload.micro_batch(0)
        losses.append(runner.forward(**batch).loss.item())
        for _ in range(3):
            runner.step([batch])
        assert runner.forward(**batch).loss.item() < losses[-1]
    assert losses == pytest.approx([losses[0]] * 3)  # all of them start as the same model
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())


def test_methods_share_the_weights_that_they_do_not_change(workload: Workload) -> None:
    base = workload.build()
    paca = Method("paca", 4).apply(base)
    assert paca.model.embed_tokens.weight is base.model.embed_tokens.weight
    assert paca.model.layers[0].mlp.up_proj.weight is not base.model.layers[0].mlp.up_proj.weight


def test_quantized_methods_train_on_one_base_and_leave_the_dense_one_alone(workload: Workload) -> None:
    base, batch = workload.build(), workload.micro_batch(0)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    floor, paca, lora = (
        StepRunner(Method(name, r), base, workload) for name, r in (("qfloor", None), ("qpaca", 4), ("qlora", 4))
    )
    # LoRA's base is the floor's. PaCA's trained columns are exact, so it begins a little nearer to the dense model.
    start = floor.forward(**batch).loss.item()
    assert lora.forward(**batch).loss.item() == start
    assert paca.forward(**batch).loss.item() == pytest.approx(start, rel=0.01)
    for runner in (paca, lora):
        for _ in range(3):
            runner.step([batch])
        assert runner.forward(**batch).loss.item() < start
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())


def test_qlora_is_pefts_adapters_on_nf4_in_a_quarter_of_the_bytes(workload: Workload) -> None:
    bitsandbytes, bnb = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft.tuners.lora.bnb")
    base = workload.build()
    model = Method("qlora", 4).apply(base)
    adapted = [module for module in model.modules() if isinstance(module, bnb.Linear4bit)]
    assert len(adapted) == 7 * LAYERS
    for layer in (module.base_layer for module in adapted):
        assert isinstance(layer, bitsandbytes.nn.Linear4bit)
        state = layer.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested, layer.compute_dtype) == (
            "nf4",
            64,
            True,
            torch.float32,
        )
        assert layer.weight.nbytes == layer.in_features * layer.out_features / 2
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert model.get_input_embeddings().weight is base.get_input_embeddings().weight


def test_quantized_methods_are_compared_with_the_quantized_floor(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = bench(model=model, methods="qpaca:4,qlora:4", batch=1, tokens=8, dtype="fp32", steps=3, threads=1)
    assert [(row["method"], row["floor"]) for row in rows] == [
        ("floor", "floor"),
        ("qfloor", "floor"),
        ("qpaca", "qfloor"),
        ("qlora", "qfloor"),
    ]
    floor, quantized, paca, _ = rows
    assert floor["ratio_to_floor"] == 1 != quantized["ratio_to_floor"]
    assert paca["ratio_to_floor"] != paca["step_ms"] / floor["step_ms"]
    assert "(qfloor)" in capsys.readouterr().out


def test_gpt2_is_measured_on_nf4(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(vocab_size=64, n_positions=16, n_embd=64, n_layer=1, n_head=2).save_pretrained(tmp_path)
    shape = Workload(model=str(tmp_path), tokens=8, dtype="fp32")
    base = shape.skeleton().to_empty(device="cpu")
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for name in ("qfloor", "qlora"):  # its Conv1D layers hold their weights transposed, and have biases
        quantized = Method(name, 4 if name == "qlora" else None).apply(base.eval())
        batch = shape.micro_batch(0)
        torch.testing.assert_close(quantized(**batch).logits, base(**batch).logits, atol=0.05, rtol=0)


class Product(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(10, 10))

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        hidden = x @ self.weight  # saves x, which is there anyway, and the weight, which is a parameter
        dropped = (hidden.sin() * hidden.cos()).detach()  # what it saves is gone with it
        return SimpleNamespace(loss=(hidden * hidden[:5].sum() * dropped.max()).sum())  # hidden and two scalars


def test_saved_bytes_count_each_storage_once_if_it_outlives_the_forward() -> None:
    runner = StepRunner.__new__(StepRunner)
    runner.forward, runner.compiled = Product(), False
    runner.resident = list(runner.forward.parameters())
    loss = 1
    assert saved_bytes(runner, {"x": torch.ones(10, 10)}) == 4 * (100 + 2 + loss)


# Selective checkpointing keeps the states of the generator that no operator makes: before a block, and after attention.
@pytest.mark.parametrize(("recompute", "random_states"), [(None, 0), ("selective", 2 * LAYERS)])
def test_saved_bytes_are_what_the_backward_frees(workload: Workload, recompute: str | None, random_states: int) -> None:
    """Also where what is kept does not pass through autograd's hooks."""
    runner = StepRunner(Method("paca", 4, recompute), workload.build(), workload)
    batch = workload.micro_batch(0)
    runner.step([batch])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = runner.forward(**batch).loss
    held = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    held -= random_states * torch.get_rng_state().nbytes
    assert saved_bytes(runner, batch) == pytest.approx(held, rel=0.001)
    del loss


def test_a_method_may_be_checkpointed_alone(workload: Workload) -> None:
    base, batch = workload.build(), workload.micro_batch(0)
    methods = parse_methods(["paca:4", "paca:4+selective", "paca:4+blocks"], [16], "both", base)
    assert [method.label for method in methods] == ["floor", "paca r=4", "paca+selective r=4", "paca+blocks r=4"]
    runners = [StepRunner(method, base, workload) for method in methods[1:]]
    saved = [saved_bytes(runner, batch) for runner in runners]
    assert saved[0] > saved[1] > saved[2]
    assert len({runner.forward(**batch).loss.item() for runner in runners}) == 1


def test_an_unknown_recomputation_is_named(workload: Workload) -> None:
    with pytest.raises(PaCAError, match=r"paca\+all: choose what to recompute from selective, blocks"):
        parse_methods(["paca+all"], [16], "both", workload.skeleton())


def test_paca_saves_r_channels_of_inputs_and_less_than_lora(workload: Workload) -> None:
    base, batch = workload.build(), workload.micro_batch(0)
    saved = {
        method.name: saved_bytes(StepRunner(method, base, workload), batch)
        for method in (Method("floor"), Method("paca", 4), Method("lora", 2))
    }
    channels = 4 * 7 * LAYERS * batch["input_ids"].numel() * 4
    assert saved["paca"] <= saved["floor"] + channels
    assert saved["lora"] > saved["paca"]


def test_checkpointing_saves_less(workload: Workload) -> None:
    workloads = [Workload(**(vars(workload) | {"checkpointing": how})) for how in (False, "selective", True)]
    saved = [saved_bytes(StepRunner(Method("paca", 4), one.build(), one), one.micro_batch(0)) for one in workloads]
    assert saved[2] < saved[1] < 0.9 * saved[0]
    assert saved[2] < 0.5 * saved[0]


def test_accumulation_averages_over_its_micro_batches(workload: Workload) -> None:
    base = workload.build()
    timings = time_methods(
        Workload(**(vars(workload) | {"accumulate": 3})), [Method("floor"), Method("paca", 4)], steps=2
    )
    assert timings[Method("paca", 4)].tokens_per_second == pytest.approx(
        3 * 2 * 16 / timings[Method("paca", 4)].step_ms * 1e3
    )
    # Three equal micro-batches are one: the same gradient, hence the same first update.
    once, thrice = (StepRunner(Method("full"), base, workload) for _ in range(2))
    once.step([workload.micro_batch(0)])
    thrice.step([workload.micro_batch(0)] * 3)
    batch = workload.micro_batch(1)
    assert thrice.forward(**batch).loss.item() == pytest.approx(once.forward(**batch).loss.item(), rel=1e-4)


def test_equal_parameters_and_equal_rank_are_both_offered() -> None:
    base = tiny_llama()
    assert parse_methods(["lora"], [8], "rank", base)[1:] == [Method("lora", 8)]
    assert parse_methods(["lora"], [8], "parameters", base)[1:] == [Method("lora", 4)]
    assert parse_methods(["paca", "lora"], [8, 16], "both", base)[1:] == [
        Method("paca", 8),
        Method("paca", 16),
        Method("lora", 8),
        Method("lora", 16),
        Method("lora", 4),
    ]
    assert parse_methods(["full", "floor", "lora:3"], [8], "both", base) == [
        Method("floor"),
        Method("full"),
        Method("lora", 3),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process' peak from /proc")
def test_peak_memory_grows_by_what_a_method_adds() -> None:
    workload = Workload(preset="small", layers=1, dtype="fp32", tokens=8)
    weights = sum(4 * parameter.numel() for parameter in workload.skeleton().parameters())
    floor = peak_bytes(workload, Method("floor"))
    full = peak_bytes(workload, Method("full"))
    # Pages of libraries come and go with the machine's memory, hence the margins.
    assert 0.9 * weights < floor < 1.6 * weights
    assert full - floor == pytest.approx(3 * weights, rel=0.2)  # gradients and two moments


def test_the_longest_sequence_is_the_last_that_fits(monkeypatch: pytest.MonkeyPatch, workload: Workload) -> None:
    tried = []

    def peak(workload: Workload, method: Method, budget: float) -> float:
        tried.append(workload.tokens)
        return 1000 * workload.tokens

    monkeypatch.setattr("paca_lightning.tools.bench.peak.peak_bytes", peak)
    assert longest_sequence(workload, Method("floor"), "1000kB") == 960
    assert len(tried) < 12
    assert longest_sequence(workload, Method("floor"), "63kB") == 0


def test_bench_finds_the_longest_sequence(model: str) -> None:
    rows = bench(
        model=model,
        methods=["paca:4"],
        batch=1,
        tokens=8,
        dtype="fp32",
        steps=1,
        threads=1,
        max_length="12MiB",
    )
    assert all(row["max_tokens"] >= 64 and row["max_tokens"] % 64 == 0 for row in rows)


@pytest.mark.slow
def test_compiled_methods_compile_a_block_each_once(workload: Workload) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    compiled = Workload(**(vars(workload) | {"compile": True}))
    methods, said = [Method("floor"), Method("paca", 4), Method("lora", 2)], []
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        timings = time_methods(compiled, methods, steps=2, progress=said.append)
    # The first block of PaCA and LoRA differs from the others: nothing asks for its input's gradient.
    assert counters["stats"]["unique_graphs"] <= 2 * len(methods) - 1
    assert not counters["graph_break"]
    assert "paca r=4: compiling" in said
    eager = time_methods(workload, methods, steps=1)
    assert all(timings[method].saved_bytes <= eager[method].saved_bytes for method in methods)


@pytest.mark.distributed
def test_several_ranks_train_together(model: str) -> None:
    rows = bench(model=model, methods="paca:4,lora:2", batch=1, tokens=8, dtype="fp32", steps=2, threads=1, devices=2)
    assert [row["method"] for row in rows] == ["floor", "paca", "lora"]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(2 * 8 / row["step_ms"] * 1e3)


def test_presets_have_the_published_sizes() -> None:
    def billions(name: str) -> float:
        return sum(parameter.numel() for parameter in Workload(preset=name).skeleton().parameters()) / 1e9

    assert billions("llama3-8b") == pytest.approx(8.03, abs=0.01)
    assert billions("llama3.1-70b") == pytest.approx(70.55, abs=0.01)
    assert preset_config("small").hidden_size == 1024
    assert Workload(preset="llama3-8b", layers=4).config.num_hidden_layers == 4
    assert set(PRESETS) == {"small", "llama3-8b", "llama3.1-70b"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": "paca,lorra"}, "no method 'lorra'.*floor, paca, lora.*qlora"),
        ({"methods": "paca:none"}, "'none' is not a rank"),
        ({"methods": "full:8"}, "'full' has no rank"),
        ({"methods": "qfloor:8"}, "'qfloor' has no rank"),
        ({"r": "8,x"}, "not a rank or a list of ranks"),
        ({"r": 0}, "ranks must be positive"),
        ({"r": 65}, "65"),
        ({"match": "size"}, "match='size' is unknown"),
        ({"preset": "llama9", "model": None}, "no preset 'llama9'.*small, llama3-8b"),
        ({"preset": "small"}, "either a model .* or a preset"),
        ({"model": None}, "either a model .* or a preset"),
        ({"model": "/nowhere/at/all"}, "No model can be read from '/nowhere/at/all'"),
        ({"layers": 3}, "layers=3 is more than the model's 2"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"devices": 0}, "ranks must be at least 1"),
        ({"device": "tpu"}, "device='tpu' is not available"),
        ({"max_length": "100kB"}, "below the model itself: its weights take"),
        ({"max_length": "lots"}, "'lots' is not an amount of memory"),
        ({"max_length": "1GiB", "compile": True, "device": "cpu"}, "without --compile"),
        ({"output": "/proc/nothing"}, "--output: '/proc/nothing' cannot be written"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    model: str, arguments: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr("paca_lightning.tools.bench.command.peak_bytes", measured)
    with pytest.raises(PaCAError, match=message):
        bench(**({"model": model} | arguments))  # type: ignore[arg-type]


def test_missing_peft_names_the_extra(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PaCAError, match=r"paca-lightning\[bench\]"):
        bench(model=model, methods="lora", steps=1)


@pytest.mark.parametrize(
    ("text", "count"), [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 MiB", 1572864), ("1000", 1000), ("5B", 5)]
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def test_amounts_of_memory_are_shown_in_binary_units() -> None:
    assert [format_bytes(count) for count in (512, 1536, 3 * 2**20, 5 * 2**29)] == [
        "512 B",
        "1.5 KiB",
        "3.0 MiB",
        "2.50 GiB",
    ]


def test_learned_positions_bound_the_length(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path / "rotary")
    assert Workload(model=str(tmp_path / "rotary"), tokens=10_000).longest == float("inf")
    from transformers import GPT2Config

    GPT2Config(n_positions=32).save_pretrained(tmp_path / "learned")
    with pytest.raises(PaCAError, match="tokens=33 is more than the model's 32 positions"):
        Workload(model=str(tmp_path / "learned"), tokens=33)


def test_the_floor_itself_is_what_all_are_compared_with(workload: Workload) -> None:
    methods = [Method("floor"), Method("paca", 4), Method("floor", recompute="blocks")]
    timings = time_methods(workload, methods, 3)
    assert timings[methods[0]].ratio_to_floor == 1
    assert timings[methods[2]].ratio_to_floor != 1
