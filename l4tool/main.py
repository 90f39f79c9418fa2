"""The command line: a lazy Click group, and the one place that catches errors and sets exit codes."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback

import click

from l4tool import __version__
from l4tool.core import console, errors
from l4tool.core.signals import Terminated, raise_lost_signals

COMMANDS = {
    "fetch": "Download a Llama 4 checkpoint: resumable, every byte checked.",
    "plan": "Show what fits where: disk, RAM, GPU memory, KV tokens.",
    "inspect": "Show a checkpoint's layout, architecture and tensors.",
    "quantize": "Quantize a Llama 4 checkpoint to INT4, FP8 or a mix of both.",
    "convert": "Write a checkpoint in another layout: Hugging Face, Meta, GGUF; resharded, cut to text, as floats.",
    "verify": "Check a checkpoint's files, names and values, or its error against the source.",
    "batch": "Run a JSONL file of prompts and images through a checkpoint.",
    "eval": "Score a checkpoint's answers, and how far it is from another one.",
    "merge": "Put the outputs of a batch's shards together, in input order.",
}

EXIT_CODES = """\b
Exit codes:
   0  done
   3  batch, eval or merge finished, but some output lines are errors
  64  options or arguments do not fit
  65  input unusable (checkpoint, config, JSONL)
  66  an input does not exist (file, folder, repository, revision)
  68  the hub cannot be reached
  69  device, backend or service not available; rate limit
  73  output cannot be written
  75  another run holds the output
  76  bytes do not match their checksum
  77  no access: gated, or licence not accepted
  78  token missing or wrong
 130  interrupted; 143 terminated"""


class LazyGroup(click.Group):
    """Lists commands from the table and imports a command's module only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"l4tool.commands.{name}")
        return with_common_options(module.command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def with_common_options(command: click.Command) -> click.Command:
    """Every command says what it says as text or JSON, and every option has an environment variable of its own name."""
    if not any(param.name == "log_format" for param in command.params):
        command.params += [
            click.Option(
                ["--log-format"], type=click.Choice(["text", "json"]), envvar="L4TOOL_LOG_FORMAT", expose_value=False,
                callback=_set_log_format, is_eager=True, help="json: each note and error is a JSON object on stderr.",
            ),
            click.Option(
                ["--quiet", "-q"], is_flag=True, envvar="L4TOOL_QUIET", expose_value=False, callback=_set_quiet,
                is_eager=True, help="Say nothing but errors.",
            ),
        ]  # fmt: skip
    for param in command.params:
        if isinstance(param, click.Option):
            param.show_envvar = True
            long = next((opt[2:].replace("-", "_") for opt in param.opts if opt.startswith("--")), param.name)
            if param.envvar is None and long != param.name:  # click would name it as the code does
                param.envvar = f"L4TOOL_{command.name}_{long}".upper().replace("-", "_")
    return command


def _set_log_format(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        console.configure(is_json=value == "json")


def _set_quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    console.configure(is_quiet=value)


@click.group(
    cls=LazyGroup,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "L4TOOL"},
)
@click.version_option(__version__, prog_name="l4tool")
def cli() -> None:
    """The Llama 4 toolchain: fetch and quantize checkpoints, run offline batches over JSONL files."""


def _on_sigterm(signum: int, frame: object) -> None:
    raise Terminated


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code and prints at most one error."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    console.configure(is_json=os.environ.get("L4TOOL_LOG_FORMAT") == "json", is_quiet=False)
    try:
        result = cli.main(args=argv, prog_name="l4tool", standalone_mode=False)
        return result if isinstance(result, int) else errors.EXIT_OK
    except click.ClickException as error:
        if console.is_json():
            console.report_error(error.format_message(), None, errors.EXIT_USAGE)
        else:
            error.show()
        return errors.EXIT_USAGE
    except errors.L4Error as error:
        if os.environ.get("L4TOOL_DEBUG") and error.__cause__ is not None:
            traceback.print_exception(error)
        return _failed(error.message, error.hint, error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _failed("interrupted", None, errors.EXIT_SIGINT)
    except Terminated:
        return _failed("terminated", None, errors.EXIT_SIGTERM)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.EXIT_OK
    except Exception as error:
        return _internal(error)


def _internal(error: Exception) -> int:
    """Our own bug: one line for the user, the traceback only on request."""
    if os.environ.get("L4TOOL_DEBUG"):
        raise error
    hint = "run again with L4TOOL_DEBUG=1 for the traceback, and report it"
    return _failed(f"internal error: {type(error).__name__}: {error}", hint, errors.EXIT_INTERNAL)


def _failed(message: str, hint: str | None, exit_code: int) -> int:
    console.report_error(message if console.is_json() else f"l4tool: {message}", hint, exit_code)
    return exit_code


def run() -> None:
    """Console-script entry point."""
    raise_lost_signals()
    try:
        code = main()
        for number in (
            signal.SIGTERM,
            signal.SIGINT,
            signal.SIGALRM,
        ):  # the interpreter's own end is no place for a traceback
            signal.signal(number, signal.SIG_IGN)
    except (Terminated, KeyboardInterrupt) as error:  # one more signal, while the first one was being reported
        code = errors.EXIT_SIGTERM if isinstance(error, Terminated) else errors.EXIT_SIGINT
    sys.exit(code)


if __name__ == "__main__":
    run()
