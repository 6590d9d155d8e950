import math
import warnings

import pytest
import torch
import transformers
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LRSchedulerCallable

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.schedules import ConstantSchedule, CosineSchedule, LinearSchedule, check_length


def optimizer(lr=0.1):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler, steps):
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (LinearSchedule, transformers.get_linear_schedule_with_warmup),
        (CosineSchedule, transformers.get_cosine_schedule_with_warmup),
    ],
)
def test_schedules_are_those_of_hugging_face_after_the_warm_up(ours, theirs, warmup):
    ours = ours(optimizer(), warmup_steps=warmup, total_steps=10)
    assert rates(ours, 10)[warmup:] == pytest.approx(rates(theirs(optimizer(), warmup, 10), 10)[warmup:])


def test_constant_schedule_is_that_of_hugging_face_after_the_warm_up():
    theirs = rates(transformers.get_constant_schedule_with_warmup(optimizer(), 4), 8)
    assert rates(ConstantSchedule(optimizer(), warmup_steps=4, total_steps=8), 8)[4:] == pytest.approx(theirs[4:])


@pytest.mark.parametrize("schedule", [ConstantSchedule, LinearSchedule, CosineSchedule])
def test_a_warm_up_rises_evenly_from_above_zero_to_the_full_rate(schedule):
    assert rates(schedule(optimizer(), warmup_steps=4, total_steps=10), 5) == pytest.approx(
        [0.02, 0.04, 0.06, 0.08, 0.1]
    )
    assert rates(schedule(optimizer(), warmup_ratio=0.1, total_steps=1), 1) == [0.05]  # a run of one step trains


def test_a_constant_rate_after_warm_up_steps_needs_no_length():
    endless = ConstantSchedule(optimizer(), warmup_steps=4)
    assert rates(endless, 8) == rates(ConstantSchedule(optimizer(), warmup_steps=4, total_steps=8), 8)
    with pytest.raises(PaCAError, match="no total_steps"):
        rates(ConstantSchedule(optimizer(), warmup_ratio=0.5), 2)


@pytest.mark.parametrize("schedule", [LinearSchedule, CosineSchedule])
def test_a_schedule_falls_to_a_share_of_the_full_rate(schedule):
    floored = rates(schedule(optimizer(), warmup_steps=3, total_steps=10, min_ratio=0.1), 13)
    assert floored[:4] == pytest.approx([0.1 / 4, 0.2 / 4, 0.3 / 4, 0.1])
    assert floored[10:] == pytest.approx([0.01] * 3)
    assert floored == sorted(floored[:3]) + sorted(floored[3:], reverse=True)


def test_the_floor_of_a_cosine_is_that_of_hugging_face():
    ours = CosineSchedule(optimizer(), warmup_steps=2, total_steps=10, min_ratio=0.2)
    theirs = transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer(), 2, 10, min_lr_rate=0.2)
    assert rates(ours, 10)[2:] == pytest.approx(rates(theirs, 10)[2:])


def test_a_floor_out_of_range_is_refused():
    with pytest.raises(PaCAError, match="min_ratio must lie between 0 and 1"):
        CosineSchedule(optimizer(), total_steps=10, min_ratio=10)


def test_a_ratio_is_a_share_of_all_steps_rounded_up():
    by_ratio = LinearSchedule(optimizer(), warmup_ratio=0.1, total_steps=25)
    by_steps = LinearSchedule(optimizer(), warmup_steps=3, total_steps=25)
    assert rates(by_ratio, 25) == rates(by_steps, 25)


def test_the_length_of_the_run_can_be_told_later():
    told_later = CosineSchedule(optimizer(), warmup_ratio=0.2)
    told_later.plan(10)
    assert rates(told_later, 10) == rates(CosineSchedule(optimizer(), warmup_ratio=0.2, total_steps=10), 10)


def test_a_schedule_goes_on_where_its_state_was_saved():
    whole = CosineSchedule(optimizer(), warmup_ratio=0.2, total_steps=10)
    rates(whole, 6)
    resumed = CosineSchedule(optimizer(), warmup_ratio=0.2, total_steps=10)
    resumed.load_state_dict(whole.state_dict())
    assert rates(resumed, 4) == rates(whole, 4)


def test_a_resumed_run_may_be_longer():
    first = LinearSchedule(optimizer(), total_steps=10)
    rates(first, 10)
    longer = LinearSchedule(optimizer(), total_steps=20)
    longer.load_state_dict(first.state_dict())
    longer.plan(20)
    assert longer.get_last_lr() == [0.05]


def test_a_schedule_without_a_length_stops_at_the_second_step():
    scheduler = LinearSchedule(optimizer())
    scheduler.optimizer.step()
    with pytest.raises(PaCAError, match="no total_steps"):
        scheduler.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_ratio": 100}, "between 0 and 1"),
        ({"warmup_ratio": -0.1}, "between 0 and 1"),
        ({"warmup_steps": -1}, "must not be negative"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "not both"),
    ],
)
def test_a_warm_up_out_of_range_is_refused(arguments, message):
    with pytest.raises(PaCAError, match=message):
        ConstantSchedule(optimizer(), total_steps=10, **arguments)


def reference_factor(curve, step, warmup, total, floor):
    """The formula of a schedule, written out."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    down = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[curve]
    return down if curve == "constant" else floor + (1 - floor) * down


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("ratio", "warmup"), [(0.0, 0), (0.1, 2), (1.0, 11)])
@pytest.mark.parametrize("curve", ["linear", "cosine", "constant"])
def test_every_step_has_the_rate_of_the_formula(curve, ratio, warmup, floor):
    schedule = {"linear": LinearSchedule, "cosine": CosineSchedule, "constant": ConstantSchedule}[curve]
    settings = {} if curve == "constant" else {"min_ratio": floor}
    seen = rates(schedule(optimizer(), warmup_ratio=ratio, total_steps=11, **settings), 14)
    assert seen == [0.1 * reference_factor(curve, step, warmup, 11, floor) for step in range(14)]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("CosineSchedule", {"warmup_ratio": 0.1, "min_ratio": 0.2}),
        ("LinearSchedule", {"warmup_steps": 3, "min_ratio": 0.2, "total_steps": 9}),
        ("ConstantSchedule", {"warmup_ratio": 0.1}),
    ],
)
def test_a_config_sets_every_parameter_of_a_schedule(name, settings):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=LRSchedulerCallable)
    config = parser.parse_object({"schedule": {"class_path": f"paca_lightning.tasks.{name}", "init_args": settings}})
    assert {key: config.schedule.init_args[key] for key in settings} == settings


@pytest.mark.parametrize(
    ("schedule", "complaint"),
    [
        (lambda o: LinearSchedule(o, warmup_steps=8, total_steps=8), "the warm-up takes 8 steps and the run 8"),
        (lambda o: ConstantSchedule(o, warmup_steps=20), "the warm-up takes 20 steps and the run 8"),
        (lambda o: CosineSchedule(o, warmup_ratio=0.1, total_steps=100), "warm-up takes 10 steps and the run 8"),
        (lambda o: CosineSchedule(o, total_steps=100), "CosineSchedule is planned for 100 steps and the run takes 8"),
        (
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=9),
            "is planned for 9 steps and the run takes 8",
        ),
        (lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=50), "is planned for 50 steps and the run takes 8"),
    ],
)
def test_a_schedule_longer_than_the_run_is_said(schedule, complaint):
    with pytest.warns(UserWarning, match=complaint):
        check_length(schedule(optimizer()), 8)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: LinearSchedule(o, warmup_steps=7, total_steps=8),
        lambda o: ConstantSchedule(o, warmup_steps=7),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=8),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=8),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0),
    ],
)
def test_a_schedule_as_long_as_the_run_passes_in_silence(schedule):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_length(schedule(optimizer()), 8)


def test_a_schedule_that_refuses_the_last_steps_is_refused():
    with pytest.raises(PaCAError, match="OneCycleLR is planned for 7 steps, and the run takes 8, which it refuses"):
        check_length(torch.optim.lr_scheduler.OneCycleLR(optimizer(), max_lr=1.0, total_steps=7), 8)
