"""The command ``paca-lightning eval``."""

import json
from importlib.metadata import version
from pathlib import Path

import rich

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import check_writable, replacing
from paca_lightning.tools.evaluation.harness import check_installed, load_tasks, measure
from paca_lightning.tools.evaluation.results import differences, plain, table, values_of
from paca_lightning.tools.generate import find_device
from paca_lightning.tools.model_with_adapters import BASE, ModelWithAdapters


def eval(
    model: str,
    tasks: str | list[str],
    adapter: str | list[str] | None = None,
    base: bool = True,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat_template: bool = False,
    output: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Measure a model, and adapters beside it, on lm-eval's tasks. No merged copy is written.

    Needs lm-eval: pip install 'paca-lightning[eval]'.

    Args:
        model: Hugging Face directory or hub id of the base model, or of a merged one.
        tasks: Names of lm-eval's tasks or groups: --tasks arc_easy mmlu. `lm-eval ls tasks` lists them.
        adapter: Adapter directory, or a checkpoint of a run. Several, --adapter A B, are measured one after the other;
            each may have a name, --adapter sql=DIRECTORY.
        base: Measure the base model too, and show the difference. false: the adapters alone.
        include_path: Directory with tasks of your own, YAML files in lm-eval's format. They may come with Python code,
            which is run.
        num_fewshot: Examples before each question. Default: as each task says.
        limit: Questions of each task, to try things out. Default: all.
        batch_size: Sequences of a forward.
        chat_template: Put prompts into the chat template, for models that were tuned on conversations.
        output: File to write the results into, as JSON.
        device: cpu, cuda, ...; auto is the accelerator if there is one.
        dtype: Of the weights: auto (as saved), float32, bfloat16 or float16.
        revision: Branch, tag or commit of the model on the hub.
        trust_remote_code: Run code that comes with the model.

    Raises:
        PaCAError: If lm-eval is not installed, there is no such task, its data cannot be reached, or the model, an
            adapter, the device or the output cannot be used.
    """
    for name, number in (("limit", limit), ("batch_size", batch_size), ("num_fewshot", num_fewshot)):
        if number is not None and number < (0 if name == "num_fewshot" else 1):
            raise PaCAError(f"{name} must be at least {0 if name == 'num_fewshot' else 1}, not {number}.")
    if output is not None:
        check_writable(Path(output).parent, "--output")
        if Path(output).is_dir():
            raise PaCAError(f"--output: {output!r} is a directory. Name a file: --output results.json.")
    check_installed()
    found_device = find_device(device)
    asked = [tasks] if isinstance(tasks, str) else tasks
    found = load_tasks(asked, include_path, num_fewshot)
    adapters = [adapter] if isinstance(adapter, str) else adapter or []
    models = ModelWithAdapters(model, adapters, dtype, revision=revision, trust_remote_code=trust_remote_code)
    models.model.to(found_device)  # type: ignore[arg-type]
    results = {}
    for name in [BASE, *models.names] if base or not adapters else models.names:
        with models.using(name) as tokenizer:
            results[name] = measure(
                models.model, tokenizer, found, limit=limit, batch_size=batch_size, chat_template=chat_template
            )
    values = {name: values_of(each) for name, each in results.items()}
    changes = {name: differences(results[BASE], results[name]) for name in models.names if BASE in results}
    rich.print(table(values, changes))
    if output is not None:
        first = next(iter(results.values()))
        content = {
            "model": model,
            "adapters": models.sources,
            "tasks": asked,
            "limit": limit,
            "chat_template": chat_template,
            "few_shot": first["n-shot"],
            "questions": {task: counts["effective"] for task, counts in first["n-samples"].items()},
            "versions": {"tasks": first["versions"], "lm_eval": version("lm-eval")},
            "results": {name: plain(each) for name, each in values.items()},
            "differences": {name: plain(each) for name, each in changes.items()},
        }
        with replacing(Path(output)) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"Written: {output}")
