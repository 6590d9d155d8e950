"""The 57 subjects of MMLU and their four categories.

The categories are those of the benchmark's authors: Hendrycks et al., "Measuring Massive Multitask Language
Understanding" (ICLR 2021, arXiv 2009.03300).
"""

from collections.abc import Sequence
from difflib import get_close_matches

from paca_lightning.core.errors import PaCAError

_SUBJECTS_BY_CATEGORY = {
    "STEM": (
        "abstract_algebra",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ),
    "humanities": (
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ),
    "social sciences": (
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ),
    "other": (
        "anatomy",
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ),
}

CATEGORIES = tuple(_SUBJECTS_BY_CATEGORY)
CATEGORY_OF = {subject: category for category, subjects in _SUBJECTS_BY_CATEGORY.items() for subject in subjects}
SUBJECTS = tuple(sorted(CATEGORY_OF))
"""Names of the 57 subjects in alphabetical order; metrics number subjects by their position here."""


def check_subjects(names: Sequence[str] | None) -> tuple[str, ...]:
    """The chosen subjects in alphabetical order; all 57 for ``None``.

    Raises:
        PaCAError: If a name is not a subject (the closest ones are named), or none is chosen.
    """
    if names is None:
        return SUBJECTS
    if isinstance(names, str) or not names:
        raise PaCAError(f"subjects must be a list of MMLU subjects such as [anatomy, virology], not {names!r}.")
    for name in names:
        check_subject(name, "subjects")
    return tuple(sorted(set(names)))


def check_subject(name: object, where: str) -> None:
    """Refuse a name that is not one of the 57 subjects.

    Args:
        name: The name to check.
        where: Its setting, or its file and row, for the message.

    Raises:
        PaCAError: If the name is unknown.
    """
    if not isinstance(name, str) or name not in CATEGORY_OF:
        close = get_close_matches(str(name), SUBJECTS, n=3) or list(SUBJECTS[:3])
        raise PaCAError(
            f"{where}: {name!r} is none of the 57 MMLU subjects. Did you mean {' or '.join(map(repr, close))}?"
        )
