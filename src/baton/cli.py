"""The `baton` command: fit, validate, test, predict (LightningCLI), chain, list, export."""

import os
import sys
from collections.abc import Sequence
from typing import Any

HELP = """usage: baton COMMAND [options]

Trains vision networks in stages and passes verified weights from one stage to the next.

  baton fit --config RECIPE.yaml [--run.name NAME] [--model.init_from RUN]   train, then hand over
  baton validate | test | predict --run.name NAME [--data ...]               look at a finished run
  baton chain CHAIN.yaml [--dry-run]                                         all stages, seeds, and the table
  baton list backbones | tasks | data [FILTER]                               what there is
  baton export RUN --to FOLDER | FILE.onnx                                   timm folder or ONNX, checked

`baton COMMAND --help` says more, `baton fit --help-all` lists every option.
Set BATON_TRACEBACK=1 to see where an error comes from.
"""
FIT_HELP = """usage: baton fit [--config RECIPE.yaml] --model TASK --data DATA [options]

Trains a network. Everything can be written in a recipe, on the command line, or both; the command line wins.

  baton fit --model Classification --model.backbone wrn_16_1 --data Shapes --trainer.max_epochs 5 --run.name first
  baton fit --model Classification --model.init_from runs/first --data CIFAR10 --data.labels_per_class 100

tasks (--model): {tasks}
data (--data):   {data}

  --config FILE.yaml               a recipe; several are laid over one another, the last one wins
  --model.backbone NAME            the network (`baton list backbones`), with --model.backbone_kwargs "{{depth: 10}}"
  --model.init_from RUN            its weights, from a run, a model folder, a checkpoint or timm:MODEL.TAG
  --model.optimizer.lr 0.1         also .name, .weight_decay, .momentum, .layer_decay …
  --model.lr_scheduler.name cosine also .warmup_epochs, .milestones, .factor …
  --data.batch_size 128            also .root, .val_size, .labels_per_class, .subset, .num_workers, .seed …
  --trainer.max_epochs 10          also .devices, .precision, .accumulate_grad_batches, .callbacks … (Lightning's)
  --run.name NAME                  the folder runs/NAME that receives everything; also .root, .keep, .test, .wandb …
  --run.resume true                continue an interrupted run exactly where its last checkpoint left it
  --seed_everything 0              seed of weights, augmentation and dropout
  --print_config                   print the whole configuration instead of training

  baton fit --model.help TASK      all options of a task; in the same way --data.help DATA
  baton fit --help-all             every option there is
"""
LOOK_HELP = """usage: baton {command} --run.name NAME [options]

{what}

The run's own configuration is the start; any option of `baton fit` changes it, such as other data:

  baton {command} --run.name first
  baton {command} --run.name first --data ImageFolder --data.root my_images --data.image_size 32

  --run.root FOLDER        where the run lies (runs)
  --run.keep best          look at the best checkpoint instead of the last one
  --ckpt_path FILE.ckpt    look at this checkpoint
  --data DATA --data.…     other data (`baton list data`)
  --trainer.…              devices, precision and the like

`baton {command} --help-all` lists every option.
"""
LOOKS = {
    "validate": "Measures a trained run on the validation split.",
    "test": "Measures a trained run on the test split.",
    "predict": "Writes a trained run's predictions to NAME/predictions/predictions.csv, one row an image.",
}
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


def check(argv: Sequence[str]) -> dict[str, Any]:
    """Parse a stage's command without running it; see `baton.stage.check`."""
    from baton.stage import check as check_stage

    return check_stage(argv)


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
        if any(arg in ("-h", "--help") for arg in args):
            print(_stage_help(command), end="")
            return 0
        from baton.stage import run_stage

        return run_stage(command, ["--help" if arg == "--help-all" else arg for arg in args])
    from baton.option_names import nearest

    near = nearest(command, COMMANDS, 1)
    hint = f"did you mean `baton {near[0]}`?" if near else f"the commands are {', '.join(COMMANDS)}."
    raise ValueError(f"{command!r} is not a command of baton; {hint}")


def _stage_help(command: str) -> str:
    if command != "fit":
        return LOOK_HELP.format(command=command, what=LOOKS[command])
    from baton.listing import data_names, task_names

    return FIT_HELP.format(tasks=", ".join(sorted(task_names())), data=", ".join(sorted(data_names())))
