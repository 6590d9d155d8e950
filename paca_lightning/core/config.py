"""What to train: the settings of a PaCA conversion, checked when they are built (standard library only)."""

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from paca_lightning.core.errors import PaCAError

ALL_LINEAR = "all-linear"
SELECTIONS = ("random", "weight_norm", "activation_norm", "gradient_norm", "quant_error", "output_error")
CALIBRATED = ("activation_norm", "gradient_norm", "output_error")
BY_ERROR = ("quant_error", "output_error")
QUANTIZATIONS = ("nf4",)
LARGEST_ALPHA = 1e9  # beyond it, and below its inverse, fp32 loses the columns or the deltas
COLUMN_STEPS = ("auto", "equal", "input_rms")


@dataclass(frozen=True, kw_only=True)
class PaCAConfig:
    """Settings of Partial Connection Adaptation (arXiv 2503.01905).

    Names match whole dotted suffixes of a module's path: ``q_proj`` or ``self_attn.q_proj``, never ``proj``. A
    pattern that matches nothing is an error, so that no typing mistake goes unnoticed.

    Args:
        r: Rank: how many input columns of each weight are trained. Trainable parameters grow with it.
        alpha: Numerator of the scaling ``alpha / r``. Default: ``r``, a scaling of 1. Adam moves a column by about
            ``scaling * lr`` each step.
        target_modules: ``"all-linear"`` (all linear layers and stacked experts, but the output head), a list of names
            (``["q_proj", "v_proj"]``), or one regular expression that must match the whole path.
        exclude_modules: Names or regular expressions of modules to leave alone.
        rank_pattern: Ranks that differ from ``r``, by name or regular expression.
        alpha_pattern: Alphas that differ from ``alpha``, by name or regular expression.
        selection: How columns are chosen. ``random`` (the paper's choice) needs nothing; ``weight_norm`` takes those
            of the largest norm; ``activation_norm`` and ``gradient_norm`` look at some training batches first;
            ``quant_error`` takes those whose weights quantization changes most, ``output_error`` those whose
            quantization changes the layer's output most, on some training batches.
        column_steps: How far an optimizer moves each column at one learning rate. ``equal``: alike. ``input_rms``: by
            the layer's rms input over the column's own, a power of two from 1/8 to 8, seen on some training batches; so
            columns of large inputs take smaller steps. ``auto``: ``input_rms`` where training batches choose the
            columns, which favours large inputs, otherwise ``equal``.
        seed: Seed of the random selection. Each layer's draw depends on this and on its path alone.
        quantize: ``nf4`` stores the frozen weights in 4 bits. Default: as they are.
        modules_to_save: Names of modules that are trained whole and saved with the adapter, such as a new head.
        train_norms: Train the weights of norms along with the columns, in fp32: few parameters. RMSNorms like Llama's
            keep less for the backward then, others a little more. They belong to checkpoints and adapters. An exact
            LoRA export is not possible then.
        train_biases: Train the biases of the converted layers and of the norms along, likewise.
        norms_lr: Learning rate of the norms and biases that are trained along, as a multiple of the optimizer's own,
            under any schedule. They have no weight decay, which would pull them to zero.
        include_frozen: Let ``"all-linear"`` convert layers that were frozen before the conversion, too. Default: what
            was frozen by hand beside trainable layers stays frozen, such as a critic or a teacher. A model that was
            frozen as a whole is converted all the same.

    Raises:
        PaCAError: If a value is outside its range or a regular expression does not compile.
    """

    r: int = 16
    alpha: float | None = None
    target_modules: str | list[str] = ALL_LINEAR
    exclude_modules: list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    selection: str = "random"
    column_steps: str = "auto"
    seed: int = 0
    quantize: str | None = None
    modules_to_save: list[str] = field(default_factory=list)
    train_norms: bool = False
    train_biases: bool = False
    norms_lr: float = 1.0
    include_frozen: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        _check_rank("r", self.r)
        for pattern, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        if self.alpha is not None:
            _check_alpha("alpha", self.alpha)
        for pattern, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{pattern!r}]", alpha)
        _check_choice("selection", self.selection, SELECTIONS)
        _check_choice("column_steps", self.column_steps, COLUMN_STEPS)
        if self.quantize is not None:
            _check_choice("quantize", self.quantize, QUANTIZATIONS)
        _check_positive("norms_lr", self.norms_lr)
        if self.norms_lr != 1 and not (self.train_norms or self.train_biases):
            raise PaCAError(f"norms_lr={self.norms_lr:g} is of norms that are trained along: set train_norms=True.")
        if self.selection in BY_ERROR and self.quantize is None:
            raise PaCAError(
                f"selection={self.selection!r} needs a quantized base. Set quantize='nf4' or another selection."
            )
        if not _is_integer(self.seed):
            raise PaCAError(f"seed must be an integer, not {self.seed!r}.")
        self._check_names()

    def _check_types(self) -> None:
        for name in ("exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise PaCAError(f"{name} must be a list of names, such as [{value!r}].")
            if not isinstance(value, (list, tuple)):
                raise PaCAError(f"{name} must be a list of names, not {value!r}.")
        for name in ("train_norms", "train_biases", "include_frozen"):
            if not isinstance(getattr(self, name), bool):
                raise PaCAError(f"{name} must be true or false, not {getattr(self, name)!r}.")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise PaCAError(f"{name} must map names to values, not {getattr(self, name)!r}.")
        if self.target_modules and not isinstance(self.target_modules, (str, list, tuple)):
            raise PaCAError(f"target_modules must be a string or a list of names, not {self.target_modules!r}.")

    def _check_names(self) -> None:
        if not self.target_modules:
            raise PaCAError(f"target_modules is empty: nothing would be trained. Name some layers, or {ALL_LINEAR!r}.")
        for name, patterns in (
            ("target_modules", [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules),
            ("exclude_modules", self.exclude_modules),
            ("rank_pattern", self.rank_pattern),
            ("alpha_pattern", self.alpha_pattern),
            ("modules_to_save", self.modules_to_save),
        ):
            _check_patterns(name, patterns)

    def rank_of(self, matched: str | None) -> int:
        """Rank under the ``rank_pattern`` key that a layer matched, or the common rank."""
        return self.r if matched is None else self.rank_pattern[matched]

    def alpha_of(self, matched: str | None, rank: int) -> float:
        """Alpha under the ``alpha_pattern`` key that a layer matched, the common alpha, or the layer's own rank."""
        if matched is not None:
            return float(self.alpha_pattern[matched])
        return float(rank if self.alpha is None else self.alpha)

    @property
    def steps_by_input(self) -> bool:
        """Whether each column's step is fitted to its input, for which some training batches are needed."""
        return self.column_steps == "input_rms" or (self.column_steps == "auto" and self.selection in CALIBRATED)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values that JSON and YAML can hold."""
        return asdict(self)

    def differences(self, other: "PaCAConfig") -> list[str]:
        """Names of the settings in which two configurations differ."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PaCAConfig":
        """The settings from plain values.

        Raises:
            PaCAError: If a name is not a setting, or a value is outside its range.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise PaCAError(f"Unknown PaCA settings {unknown}. Known: {sorted(known)}.")
        return cls(**values)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_rank(name: str, value: object) -> None:
    if not _is_integer(value) or value <= 0:  # type: ignore[operator]
        raise PaCAError(f"{name} must be a positive integer, not {value!r}.")


def _check_positive(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]
        raise PaCAError(f"{name} must be a positive number, not {value!r}.")


def _check_alpha(name: str, value: object) -> None:
    _check_positive(name, value)
    if not 1 / LARGEST_ALPHA <= value <= LARGEST_ALPHA:  # type: ignore[operator]
        raise PaCAError(f"{name} must lie between {1 / LARGEST_ALPHA:g} and {LARGEST_ALPHA:g}, not {value!r}.")


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise PaCAError(f"{name}={value!r} is unknown. Choose one of {list(choices)}.")


def _check_patterns(name: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise PaCAError(f"{name} holds {pattern!r}, which is not a module name.")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise PaCAError(f"{name}={pattern!r} is not a regular expression: {error}.") from error
