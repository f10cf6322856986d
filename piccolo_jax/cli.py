"""What every command shares: how flags become a Config, and how errors become exit codes."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from piccolo_jax import config as config_lib
from piccolo_jax.config import Config
from piccolo_jax.errors import UserError


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command and exits: 0 done, 2 for what the user can mend, with one message."""
    try:
        sys.exit(main(sys.argv) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse_config(argv: list[str], usage: str) -> tuple[Config, Path]:
    """Config and workdir of `--config=FILE --workdir=DIR [--config.FIELD=VALUE ...]`.

    Raises UserError for an unknown flag or field, a value of the wrong type, and a config that
    can't be loaded or isn't valid.
    """
    if {"--help", "-h"} & set(argv):
        print(usage)
        sys.exit(0)
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "Folder for everything the run writes.", flag_values=values
    )
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=False)
    path = _config_path(argv)
    if path and not Path(path.partition(":")[0]).is_file():
        raise UserError(f"--config={path}: there is no such file")
    try:
        rest = values(argv)[1:]
    except (Exception, SystemExit) as error:  # the config file is code, and can raise anything
        raise UserError(_explain(error, argv)) from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}\n{usage}")
    for name in ("config", "workdir"):
        if not values[name].value:
            raise UserError(f"--{name} is missing\n{usage}")
    config = values["config"].value
    if not isinstance(config, Config):
        raise UserError(f"--config: get_config() must return a Config, not {type(config).__name__}")
    config_lib.validate(config)
    return config, Path(values["workdir"].value)


def _explain(error: BaseException, argv: list[str]) -> str:
    path = _config_path(argv)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if path and path in f.filename]
    place = f"{path}:{frames[-1].lineno}: " if frames else ""
    if isinstance(error, KeyError):  # how config_flags reports --config.x of an unknown x
        return f"{place}unknown config field: {error.args[0]}"
    kind = "" if isinstance(error, flags.Error) else f"{type(error).__name__}: "
    return f"{place}{kind}{error}"


def _config_path(argv: list[str]) -> str:
    return next((arg.partition("=")[2] for arg in argv if arg.startswith("--config=")), "")
