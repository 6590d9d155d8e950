"""What is said of versions agrees: pyproject.toml, the README, the tested versions, and the lock files with hashes."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
REQUIREMENTS = [Requirement(line) for line in REQUIRED if not line.startswith("paca-lightning")]


def pins(file: str) -> dict[str, str]:
    """Versions by canonical name."""
    found = re.findall(r"^([\w.-]+)==([\w.+!-]+)", (ROOT / "constraints" / file).read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def test_the_readme_names_the_lowest_versions() -> None:
    lowest = {requirement.name: str(requirement.specifier).removeprefix(">=") for requirement in REQUIREMENTS}
    said = re.search(
        r"Python >= ([\d.]+), torch >= ([\d.]+), Lightning >= ([\d.]+), transformers >= ([\d.]+)\.",
        (ROOT / "README.md").read_text(),
    )
    assert said is not None
    python = PROJECT["requires-python"].removeprefix(">=")
    assert said.groups() == (python, lowest["torch"], lowest["lightning"], lowest["transformers"])


def test_tested_versions_are_allowed_ones() -> None:
    tested = pins("tested.txt") | pins("guests.txt")
    allowed = {canonicalize_name(requirement.name): requirement.specifier for requirement in REQUIREMENTS}
    assert len(tested) > 30
    assert [name for name, version in tested.items() if name in allowed and version not in allowed[name]] == []
    assert sorted(allowed.keys() - tested.keys() - {"tqdm", "typing-extensions", "triton"}) == []


def test_the_lock_files_have_the_tested_versions_and_hashes() -> None:
    """After a change of constraints/tested.txt or of pyproject.toml, `make lock` writes them again."""
    rest, gpu = pins("lock.txt"), pins("lock-gpu.txt")
    assert rest.keys() & gpu.keys() == set()
    locked = pins("guests.txt") | rest | gpu
    assert {name: locked.get(name) for name in pins("tested.txt")} == pins("tested.txt")
    assert [r.name for r in REQUIREMENTS if locked.get(canonicalize_name(r.name), "0") not in r.specifier] == []
    for file in ("lock.txt", "lock-gpu.txt", "guests.txt"):
        entries = re.split(r"\n(?=\w)", (ROOT / "constraints" / file).read_text())
        assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_what_is_installed_by_hash_needs_no_torch_of_one_build() -> None:
    """PyPI's torch and all that it brings for CUDA are apart, so that the rest suits any build."""
    cuda = re.compile(r"torch|triton|cuda-.*|nvidia-.*")
    assert [name for name in pins("lock.txt") if cuda.fullmatch(name)] == []
    assert "torch" in pins("lock-gpu.txt")
