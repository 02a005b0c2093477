"""The `rondel` program: eleven commands, each loaded when its name is asked for, and one place where errors end.

A command is the function named like its module. This file knows the names and one line about each, so that
`rondel --help` imports nothing else.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rondel.converters.errors import RegressionError, RondelError

# The six verbs in the order of the chain, then what stands beside them. The lines equal the docstrings' first ones.
COMMANDS = {
    "calibrate": "Measure what every linear layer of MODEL sees on text.",
    "rotate": "Change the basis of MODEL's weights so that they round better, where that pays; its function stays.",
    "quantize": "Round the weights of MODEL to block formats.",
    "replicate": "Let layers of MODEL run more than once.",
    "export": "Write MODEL as a GGUF file.",
    "run": "Continue a text with a GGUF model.",
    "build": "Run the whole chain of a recipe, and go on where it was interrupted.",
    "eval": "Measure perplexity, and the divergence from another model's logits.",
    "inspect": "Show what a GGUF file or a rondel folder holds.",
    "verify": "Check every length, scale and hash of a GGUF file or a rondel folder.",
    "bench": "Measure tokens a second, and the share of the memory bandwidth reached.",
}
HELP_WIDTH = 100  # characters: help is read in terminals and pasted into README.md

# Operating system errors that a user can cause; all others are bugs.
USER_CAUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR)

FAILED, REFUSED, INTERRUPTED, BROKEN_PIPE = 1, 3, 130, 141
PYDANTIC_PREFIX = "Value error, "  # what Typer's validation puts before a sentence about a wrong choice


class PipeClosed(Exception):
    """The reader of standard output has enough, as in `rondel inspect FILE | head`. Typer would exit with 1 for it."""


class Commands(TyperGroup):
    """The group that lists commands from the table and imports the one that is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of the chain."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise PipeClosed from error
        except typer.BadParameter as error:
            error.message = error.message.removeprefix(PYDANTIC_PREFIX)
            raise

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The table as it stands: asking every command for its first line would import them all."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def load_command(name: str) -> Any:
    """The command as Typer makes it from the function `name` of the module `rondel.cli.name`."""
    function = getattr(importlib.import_module(f"rondel.cli.{name}"), name)
    single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    single.command(name, context_settings=CONTEXT)(function)
    return typer.main.get_command(single)


CONTEXT = {"help_option_names": ["--help", "-h"], "max_content_width": HELP_WIDTH}

app = typer.Typer(
    cls=Commands,
    context_settings=CONTEXT,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=True,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"rondel {version('rondel')}")
        raise typer.Exit


@app.callback()
def rondel(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a PyTorch language model into a GGUF file of 1.5 to 4.5 bits a weight, and run it on a CPU.

    The first six commands are the chain: each reads one folder and writes the next, export writes the GGUF file and
    run generates text with it. MODEL is a Hugging Face folder or the output of an earlier command.

    Example:

    \b
      rondel export MODEL --type F16 -o model.gguf
      rondel run model.gguf -p "Once upon a time"
    """


def _sentence(error: BaseException) -> str | None:
    """What to tell the user, or None where the error is a bug and keeps its traceback."""
    native = sys.modules.get("rondel.native.library")  # not imported: then nothing of it was raised
    if isinstance(error, RondelError) or (native is not None and isinstance(error, native.NativeError)):
        return str(error)
    if isinstance(error, OSError) and error.errno in USER_CAUSED:
        return f"{error.filename or 'output'}: {error.strerror}"
    return None


def main() -> None:
    """Run the command line.

    Exit codes: 0, 1 (an error, told in one line), 2 (wrong usage), 3 (refused: it makes the model worse), 130, 141
    (closed pipe).
    """
    try:
        try:
            app(prog_name="rondel")
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:  # between two commands of Python; inside a command Typer does the same
        sys.exit(INTERRUPTED)
    except (PipeClosed, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        from rondel.cli import console

        console.error(sentence)
        sys.exit(REFUSED if isinstance(error, RegressionError) else FAILED)
