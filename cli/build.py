"""`rondel build`: a recipe's whole chain. Each stage resumes by itself, so this file only calls them in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rondel.cli import console, decision
from rondel.cli.options import (
    DeviceOption,
    DryRunOption,
    ForceOption,
    JsonOption,
    OutputOption,
    QuietOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from rondel.cli.recipe import Recipe
    from rondel.converters.checkpoint import Checkpoint
    from rondel.converters.stats import Stats
    from rondel.quant.quantize import QuantizeConfig

# The folders of a build, by stage.
FOLDERS = {"calibrate": "calib", "rotate": "rotated", "quantize": "quantized", "replicate": "replicated"}


def build(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A TOML file; configs/default.toml shows every key.")
    ],
    output: OutputOption,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="MODEL", help="The model to start from, instead of the recipe's.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="FILE", help="Calibrate on this text, not the recipe's. May be repeated."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting. May be repeated."),
    ] = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the whole chain of a recipe, and go on where it was interrupted.

    Stages that are finished with the same inputs and settings are skipped; one that was killed goes on behind its last
    finished block. The same recipe and model give the same bytes. A [run] section prints a text in the end.

    Example:

    \b
      rondel build configs/demo.toml -o demo/
      rondel build configs/q4.toml --model MODEL --text mine.txt -o q4/
      rondel build configs/q4.toml --model MODEL -o q2/ --set quantize.type=Q2_K
    """
    from rondel.cli.recipe import load_recipe

    chosen = load_recipe(recipe, set_ or (), model, text or ())
    plans = check(chosen, output)
    if dry_run:
        return console.plan(plans, as_json=as_json)
    told = []

    def tell(facts: dict[str, Any], line: str) -> None:
        told.append(facts)
        console.result({}, line, as_json=False, quiet=quiet or as_json)

    files = chain(chosen, output, tell, threads=threads, device=device, force=force, quiet=quiet)
    if as_json:
        console.result({"command": "build", "stages": told, "files": [str(file) for file in files]}, "", as_json=True)
    elif "run" in chosen.sections and not quiet:
        from rondel.cli.run import run

        print()
        run(files[0], echo=True, threads=threads, **asdict(chosen.sections["run"]))
    return None


def check(recipe: Recipe, out: Path) -> dict[str, Any]:
    """The plan of each stage, as if it read MODEL itself: refuses now what would be refused hours later."""
    from rondel.converters import export as exporter
    from rondel.converters.checkpoint import open_checkpoint
    from rondel.converters.errors import RondelError

    source = open_checkpoint(recipe.model)
    plans: dict[str, Any] = {"model": str(recipe.model)}
    for name, settings in _stages(recipe):
        stage = import_module(f"rondel.quant.{name}")
        if name == "calibrate":
            planned = stage.plan(source, settings, recipe.text)
        elif name == "rotate" and "calibrate" in recipe.sections:
            planned = stage.plan(source, stage.before_statistics(settings))
            planned |= {"kind": settings.kind, "rotate": settings.rotate}
        elif name == "replicate":
            planned = stage.plan(source, settings, source, recipe.replicate_text)
        elif name == "quantize" and "calibrate" in recipe.sections:
            planned = _plan_before_statistics(source, settings)
        else:
            planned = stage.plan(source, settings)
        # Line by line is for `quantize --dry-run`; and statistics are on their way.
        told = {key: value for key, value in planned.items() if key not in ("tensors", "warnings", "stage")}
        plans[name] = {"output": str(out / FOLDERS[name])} | told
    settings = recipe.sections["export"]
    if settings.type and "quantize" in recipe.sections:
        raise RondelError(
            f"[export] type = {settings.type!r} is for models that are not quantized; leave out one of them"
        )
    exporter.plan(source, out, replace(settings, materialize=False))
    return plans | {"export": {"output": str(out)} | asdict(settings)}


def _plan_before_statistics(source: Checkpoint, config: QuantizeConfig) -> dict[str, Any]:
    """quantize's plan as far as it is known; with a budget the statistics decide the formats, and so the sizes."""
    from rondel.quant.quantize import plan
    from rondel.quant.quantize_task import before_statistics

    reduced = before_statistics(config)
    planned = plan(source, reduced)
    asked = {key: value for key, value in asdict(config).items() if value != getattr(reduced, key)}
    if asked.keys() & {"bpw", "size", "like"}:
        return {"config": planned["config"] | asked | {"type": None}}
    return planned | {"config": planned["config"] | asked}


def _stages(recipe: Recipe) -> list[tuple[str, Any]]:
    return [(name, settings) for name, settings in recipe.sections.items() if name in FOLDERS]


def chain(
    recipe: Recipe,
    out: Path,
    tell: Callable[[dict[str, Any], str], None],
    *,
    threads: int | None,
    device: str,
    force: bool,
    quiet: bool,
) -> list[Path]:
    """Run the stages of a recipe into folders of `out` and write the GGUF files there; `tell` hears of each."""
    from rondel.cli.recipe import recipe_text
    from rondel.converters.checkpoint import open_checkpoint
    from rondel.converters.export import export

    written = recipe_text(recipe)
    original = source = open_checkpoint(recipe.model)
    statistics: Path | None = None
    for name, settings in _stages(recipe):
        folder = out / FOLDERS[name]
        stage = getattr(import_module(f"rondel.quant.{name}"), name)
        given = _second_input(name, recipe, source, original, statistics)
        running: dict[str, Any] = {"threads": threads, "device": device, "force": force}
        if name == "quantize":
            running["recipe"] = written
        elif name == "replicate":
            running["text"] = recipe.replicate_text
        with console.progress(quiet=quiet) as progress:
            made = stage(source, folder, settings, given, progress=progress, **running)
        wrote = console.written(name, folder, made.manifest)
        tell(*(decision.with_choice(*wrote, made.manifest) if name == "rotate" else wrote))
        if name == "calibrate":
            statistics = folder
        else:
            source = made
    out.mkdir(parents=True, exist_ok=True)
    with console.progress(quiet=quiet) as progress:
        files = export(source, out, recipe.sections["export"], recipe=written, force=force, progress=progress)
    for file in files:
        stored = file.stat().st_size
        tell({"command": "export", "output": str(file), "bytes": stored}, f"{file}  {console.size(stored)}")
    return files


def _second_input(
    name: str, recipe: Recipe, source: Checkpoint, original: Checkpoint, statistics: Path | None
) -> Sequence[Path] | Stats | Checkpoint | None:
    """What a stage reads beside its model: text, statistics in the model's basis, or the teacher."""
    from rondel.converters.stats import stats_for

    if name == "calibrate":
        return recipe.text
    return original if name == "replicate" else stats_for(source, statistics)
