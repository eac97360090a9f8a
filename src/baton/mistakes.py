"""Turns whatever a user got wrong into one sentence: where it is, what was expected, what came, the nearest names."""

import difflib
import errno
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

from baton.option_names import CommandLine, nearest, nearest_keys

_UNION = "Does not validate against any of the Union subtypes"
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping",
    "list": "a list",
    "NoneType": "null",
}
_KINDS = {"model": ("task", "tasks"), "data": ("data module", "data")}
_FROM_OUTSIDE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}


# ------------------------------------------------------------------------------------------- the command line, recipes


def explain(message: str, parser: Any) -> str:
    """Return one sentence for a message of jsonargparse's, which are long and name its own types.

    Args:
        message: what the parser complains about.
        parser: the parser, which knows all options; the command line itself is read from `sys.argv`.
    """
    line = CommandLine(sys.argv[1:], parser)
    key, text, value = _innermost(message)
    for rule in (_missing, _without_value, _unknown_option, _unknown_class, _wrong_type):
        sentence = rule(line, key, text, value)
        if sentence is not None:
            return sentence
    return f"{line.place(key)}: {_one_line(text)}" if key else _one_line(text)


def check_recipes(args: Sequence[str]) -> None:
    """Read every file named by `--config`, before the parser does.

    Raises:
        FileNotFoundError: one is not there.
        ValueError: one is no YAML, or holds something else than settings.
    """
    for name, content in CommandLine(args, None).recipe_files():
        if isinstance(content, OSError):
            near = nearest(Path(name).name, [path.name for path in _siblings(Path(name))])
            raise FileNotFoundError(f"The recipe {name} cannot be read: {_reason(content)}{_nearest_are(near)}.")
        if isinstance(content, Exception):
            where = getattr(content, "problem_mark", None)
            line = f" in line {where.line + 1}, column {where.column + 1}" if where else ""
            what = getattr(content, "problem", None) or getattr(content, "reason", None) or "it cannot be read"
            raise ValueError(f"The recipe {name} is not valid YAML{line}: {what}.")
        if not isinstance(content, dict):
            held = "nothing" if content is None else f"a {type(content).__name__}"
            raise ValueError(f"The recipe {name} must hold settings such as `model:` and `data:`, but holds {held}.")


def _siblings(path: Path) -> list[Path]:
    return list(path.parent.iterdir()) if path.parent.is_dir() else []


def _innermost(message: str, key: str = "", value: str = "") -> tuple[str, str, str]:
    """Unwrap a message to what is wrong in the end: (dotted key, complaint, value given)."""
    text = dedent(message).strip("\n")
    if found := re.match(r'Parser key "([^"]+)":\s*(.*)', text, re.DOTALL):
        return _innermost(found[2], f"{key}.{found[1]}".lstrip("."), value)
    if found := re.match(r"\s*- Expected a path but .*? not accessible or invalid\s*- (.*)", text, re.DOTALL):
        return _innermost(found[1], key, value)
    if found := re.match(r"-*(\S+\.help): (.*)", text, re.DOTALL):
        return _innermost(found[2], found[1], value)
    found = re.match(r"Problem with given class_path '.*?':\s*(.*)", text, re.DOTALL)
    if found and not re.match(r"No module|module |'?\w+'? is not a package|cannot import", found[1]):
        return _innermost(found[1], key, value)
    found = re.match(rf"{_UNION}.*?Errors:\n(.*)\n\s*Given value type:.*?\n\s*Given value: (.*)", text, re.DOTALL)
    if found is None:
        return key, text, value
    value = found[2].strip()
    errors = _items(found[1])
    if all(re.match("Expected an? (?!dot import)", error) for error in errors):
        inside = [error for error in errors if ". Got value: " in error]  # the container fits, and something in it not
        text = inside[0].replace(". Got value: ", ". Got inside: ") if inside else " or ".join(errors)
        return key, text, value
    return _innermost(max(errors, key=_specificity), key, value)


def _items(text: str) -> list[str]:
    """The items of a list of dashes, at its outermost level."""
    indent = re.match(r" *", text)
    assert indent is not None
    return [item.strip("\n") for item in re.split(rf"^{indent[0]}- ", text, flags=re.MULTILINE) if item.strip()]


def _specificity(error: str) -> int:
    """Of the alternatives of a type, the one that came furthest is what the user meant."""
    if re.search("is not accepted|does not accept|unrecognized arguments", error) or error.startswith("Parser key"):
        return 4
    if error.startswith(("Expected a dot import path", "Import path", "Problem with")):
        return 3
    if error.startswith(("Expected a", "Not a valid subclass")):
        return 1
    return 2


def _missing(line: CommandLine, key: str, text: str, value: str) -> str | None:
    found = re.match(r"the following arguments are required: (.*)", text)
    if found is None:
        return None
    keys = sorted((name.partition(".")[2] or name for name in found[1].split(", ")), reverse=True)
    if line.command != "fit":
        name = line.given("run.name")
        if name is None:
            return f"`baton {line.command}` looks at a finished run: name it with --run.name.{_runs(line)}"
        return f"There is no run {Path(line.given('run.root') or 'runs', name)} with a config.yaml.{_runs(line, name)}"
    wanted = " and ".join(f"--{name} {'TASK' if name == 'model' else name.upper()}" for name in keys)
    lists = " and ".join(f"`baton list {_KINDS[name][1]}`" for name in keys if name in _KINDS)
    return f"`baton fit` needs {wanted}, or a recipe (--config FILE.yaml) that says so; {lists} shows what there is."


def _runs(line: CommandLine, name: str = "") -> str:
    root = Path(line.given("run.root") or "runs")
    runs = sorted(path.parent.name for path in root.glob("*/config.yaml"))
    if not runs:
        return f" There is no run in {root} yet."
    near = nearest(name, runs) if name else []
    return f" The nearest is {near[0]}." if near else f" The runs in {root}: {', '.join(runs[-5:])}."


def _without_value(line: CommandLine, key: str, text: str, value: str) -> str | None:
    found = re.match(r"argument -{1,2}\S+?: expected (one|at least one) argument", text)
    if found is None:
        return None
    alone = line.option_without_value()
    return f"{alone or text.split()[1].rstrip(':')} needs a value."


def _unknown_option(line: CommandLine, key: str, text: str, value: str) -> str | None:
    if found := re.match(r"unrecognized arguments: (.*)", text, re.DOTALL):
        option = re.split(r"[\s=]", found[1], maxsplit=1)[0]
        if not option.startswith("--"):
            extra = f"; options begin with two dashes, --{option.strip('-')}" if option.startswith("-") else ""
            return f"`baton {line.command}` does not know what to do with {option!r}{extra}."
        option = option[2:]
    elif found := re.match(r"Group '(.+?)' does not accept option '(.+?)'", text):
        option = f"{found[1]}.{found[2]}"
    elif found := re.match(r"(?:Subcommand '.+?' does not accept option|Option) '(.+?)'", text):
        option = found[1]
    else:
        return None
    if option == "class_path" and "'class_path':" in value:
        return f"{line.place(key)}: beside class_path, everything belongs under init_args; check the indentation there."
    owner = line.class_of(key, option, value) if key else None
    full = f"{key}.{option}" if key else option
    near = nearest_keys(full, line.keys(key, owner))
    unknown = line.place(full)
    # Of `modle.class_path` only the first word is wrong, and of `model.init_args.lrr` the user never wrote init_args.
    if not key and option.partition(".")[0] not in line.groups():
        first = option.partition(".")[0]
        near = nearest(first, line.groups()) or near
        unknown = line.place(first)
    whose = owner.__name__ if owner is not None else f"`baton {line.command}`"
    if full in near and owner is not None:  # read before the class was known
        return f"{unknown} stands before --{key}: write --{key} {whose} first, and its options after it."
    return f"{unknown} is not an option of {whose}{_nearest_are(near, line.dashes(full))}."


def _unknown_class(line: CommandLine, key: str, text: str, value: str) -> str | None:
    if found := re.match(r"Expected a dot import path string: (.*)", text):
        key = key.removesuffix(".help")
        name, known = found[1], line.classes(key)
        kind, word = _KINDS.get(key, (key.rpartition(".")[2].removesuffix("s"), None))
        near = nearest(name, known)
        if not near and word:
            return f"{line.place(key)}: there is no {kind} {name!r}; there are {', '.join(known)}."
        see = f" (`baton list {word}`)" if word else ""
        return f"{line.place(key)}: there is no {kind} {name!r}{see}{_nearest_are(near)}."
    if found := re.match(r"Import path does not correspond to a subclass of (\w+)", text):
        return f"{line.place(key)} expects a subclass of {found[1]}, but got {value!r}."
    if found := re.match(r"Problem with given class_path '(.+?)':\s*(.*)", text, re.DOTALL):
        return f"{line.place(key)}: cannot import {found[1]!r}: {_one_line(found[2])}."
    return None


def _wrong_type(line: CommandLine, key: str, text: str, value: str) -> str | None:
    if not re.match("Expected an? ", text):
        return None
    inside = ". Got inside: " in text
    text, _, got = text.partition(". Got inside: " if inside else ". Got value: ")
    nested = re.search(r"val=(.*)\)$", value) if value.startswith("NestedArg(") else None
    got = got or (nested[1] if nested else value)
    got = got.strip("'\"")
    choices = [
        choice.strip("'\" ") for literal in re.findall(r"Literal\[(.*?)\]", text) for choice in literal.split(",")
    ]
    if choices:
        near = difflib.get_close_matches(got, choices, 1)
        shown = ", ".join(dict.fromkeys(choices))
        return f"{line.place(key)} must be one of {shown}, but got {got!r}{_nearest_are(near)}."
    names = dict.fromkeys(re.findall(r"<class '(?:\w+\.)*(\w+)'>", text))
    expected = " or ".join(_TYPES.get(name, f"a {name}") for name in names)
    if expected and inside:
        return f"{line.place(key)} must have {expected} in place of {got!r}, but got {_one_line(value)}."
    return f"{line.place(key)} must be {expected}, but got {got!r}." if expected else None


def _nearest_are(near: Sequence[str], dashes: str = "") -> str:
    return (
        f"; the nearest {'is' if len(near) == 1 else 'are'} {' and '.join(dashes + name for name in near)}"
        if near
        else ""
    )


# --------------------------------------------------------------------------------------------- errors of the run itself


def sentence(error: BaseException) -> str | None:
    """Return what the command prints for an error, or None if the error is a defect and its traceback matters.

    A ValueError or OSError that Baton itself raised carries a sentence, also where a worker of a DataLoader passed it
    on. Errors that others raise count as the user's where they come from a setting or from outside the program;
    everything else is a defect.
    """
    while str(error).startswith(_UNION) and error.__cause__ is not None:
        error = error.__cause__  # jsonargparse wraps what a constructor raises
    text = _one_line(str(error)) or type(error).__name__
    frames = list(traceback.walk_tb(error.__traceback__))
    files = [Path(frame.f_code.co_filename).as_posix() for frame, _ in frames]
    inside = Path(__file__).parent.as_posix()
    if isinstance(error, ValueError | OSError) and files and files[-1].startswith(f"{inside}/"):
        return text if not isinstance(error, OSError) or error.errno is None else _outside(error)
    if isinstance(error, ValueError) and (passed_on := _from_a_worker(error, inside)):
        return passed_on
    if isinstance(error, OSError) and error.errno in _FROM_OUTSIDE:
        return _outside(error)
    if type(error).__name__ == "OutOfMemoryError":
        return f"The device has too little memory ({text}): lower data.batch_size."
    called = {
        (file.removeprefix(f"{inside}/"), frame.f_code.co_name): frame
        for file, (frame, _) in zip(files, frames, strict=True)
    }
    return _from_a_setting(error, text.rstrip(".!"), called)


def _from_a_worker(error: ValueError, inside: str) -> str | None:
    """What Baton said in a worker: torch raises the error's class again, with the whole traceback as its message."""
    if type(error).__module__.partition(".")[0] == "baton":
        return _one_line(str(error))  # such as UnreadableImageError, which keeps its sentence
    if not re.match(r"Caught ValueError in DataLoader worker", str(error)):
        return None
    files = re.findall(r'^ *File "(.*?)", line', str(error), re.MULTILINE)
    raised = str(error).rpartition("\nValueError: ")[2]
    return _one_line(raised) if files and files[-1].startswith(f"{inside}/") else None


def _from_a_setting(error: BaseException, text: str, called: dict[tuple[str, str], Any]) -> str | None:
    """Errors of other libraries where they check a setting of the user's."""
    if "could not find the monitored key" in text:
        found = re.search(r"monitor='(.*?)'.*?metrics: \[(.*?)\]", text)
        assert found is not None
        known = [name for name in re.findall(r"'(.*?)'", found[2]) if "/" in name]
        near = _nearest_are(difflib.get_close_matches(found[1], known, 2))
        return f"run.monitor={found[1]} is not a metric of this run, which has {', '.join(known)}{near}."
    frame = called.get(("backbones/factory.py", "create_backbone"))
    if frame is not None:
        kwargs = {name: value for name, value in frame.f_locals["kwargs"].items() if name != "num_classes"}
        name = frame.f_locals["name"]
        return f"The backbone {name!r} cannot be built with {kwargs}: {text}." if kwargs else None
    if ("optim.py", "build") in called and isinstance(error, ValueError):
        return f"model.optimizer: {text}."
    if any(file.endswith("timm/layers/patch_embed.py") for file, _ in called) and isinstance(error, AssertionError):
        return f"The images do not fit the backbone: {text}; give them that size, or set backbone_kwargs.img_size."
    if any(function == "_verify_batch_size" for _, function in called):
        return f"{text}: a batch of one image is too small to normalise; set data.drop_last=true."
    trainer = any(file.endswith("trainer/trainer.py") and function == "__init__" for file, function in called)
    if (trainer and isinstance(error, ValueError | TypeError)) or type(error).__name__ == "MisconfigurationException":
        return f"The trainer's settings do not work here: {text}."
    return None


def _outside(error: OSError) -> str:
    return f"{error.filename or 'The system refuses'}: {_reason(error)}."


def _reason(error: OSError) -> str:
    return error.strerror or _one_line(str(error))


def _one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text.strip())
