"""The `baton` command: fit, validate, test, predict (LightningCLI), chain, list, export."""

import os
import sys
from collections.abc import Sequence

HELP = """usage: baton COMMAND [options]

Trains vision networks in stages and passes verified weights from one stage to the next.

  baton fit --config RECIPE.yaml [--run.name NAME] [--model.init_from RUN]   train, then hand over
  baton validate | test | predict --run.name NAME [--data ...]               look at a finished run
  baton chain CHAIN.yaml [--dry-run]                                         all stages, seeds, and the table
  baton list backbones | tasks | data [FILTER]                               what there is
  baton export RUN --to FOLDER | FILE.onnx                                   timm folder or ONNX, checked

`baton COMMAND --help` says more; `baton fit --model Classification --model.help` lists a task's options.
Set BATON_TRACEBACK=1 to see where an error comes from.
"""
LIGHTNING = ("fit", "validate", "test", "predict")
COMMANDS = (*LIGHTNING, "chain", "list", "export")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    try:
        return _dispatch(args[0], args[1:])
    except KeyboardInterrupt:
        print("baton: interrupted; continue with the same command and --run.resume=true.", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        from baton.mistakes import sentence

        explanation = None if os.environ.get("BATON_TRACEBACK") else sentence(error)
        if explanation is None:
            raise
        print(f"baton: error: {explanation}", file=sys.stderr)
        return 2


def _dispatch(command: str, args: list[str]) -> int:
    if command == "list":
        from baton.listing import run_list

        return run_list(args)
    if command == "chain":
        from baton.chain import main as run_chain_command

        return run_chain_command(args)
    if command == "export":
        from baton.export import run_export

        return run_export(args)
    if command in LIGHTNING:
        from baton.stage import run_stage

        return run_stage(command, args)
    from baton.option_names import nearest

    near = nearest(command, COMMANDS, 1)
    hint = f"did you mean `baton {near[0]}`?" if near else f"the commands are {', '.join(COMMANDS)}."
    raise ValueError(f"{command!r} is not a command of baton; {hint}")
