"""What every command shares: how flags become a Config, and how errors become exit codes."""

import errno
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import cast

from absl import flags
from ml_collections import config_flags

from piccolo_jax import config as config_lib
from piccolo_jax import distributed
from piccolo_jax.config import Config
from piccolo_jax.errors import UserError

# What the machine, and not this program, has to do with: no right, no room, no such device.
_MACHINE_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO,
    errno.EMFILE, errno.ENFILE, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


class _NumberOrNone(flags.ArgumentParser[float | None]):
    """A float, or None for fields that can be None; what can't is refused by config.validate."""

    _number = flags.FloatParser()

    def parse(self, argument: str | float | int) -> float | None:
        return None if str(argument).lower() == "none" else self._number.parse(argument)


config_flags.register_flag_parser_for_type(float, _NumberOrNone())


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command and exits: 0 done, 2 for what the user can mend, with one message."""
    try:
        sys.exit(main(sys.argv) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.leave(2)
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}: make room, or give another folder", file=sys.stderr)
        distributed.leave(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        distributed.leave(128 + signal.SIGINT)


def parse_config(argv: list[str], usage: str) -> tuple[Config, Path]:
    """Config and workdir of `--config=FILE --workdir=DIR [--config.FIELD=VALUE ...]`.

    Raises UserError as parse() does.
    """
    config, values = parse(argv, usage, required=("config", "workdir"))
    return config, Path(str(values["workdir"].value))


def parse(
    argv: list[str],
    usage: str,
    required: tuple[str, ...],
    define: Callable[[flags.FlagValues], None] = lambda values: None,
) -> tuple[Config, flags.FlagValues]:
    """Config and flags of `--config=FILE [--workdir=DIR] [--config.FIELD=VALUE ...]`.

    `define` adds the command's own flags. Raises UserError for an unknown flag or field, a value of
    the wrong type, and a config that can't be loaded or isn't valid.
    """
    if {"--help", "-h"} & set(argv):
        print(usage)
        sys.exit(0)
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "Folder for everything the run writes.", flag_values=values
    )
    define(values)
    overridden = [m[1] for m in map(re.compile(r"--?(?:no)?config\.([^=]+)").match, argv) if m]

    def load(path: str) -> Config:
        config = _load(path)
        for field in overridden:
            config_lib.get(config, field)
        return config

    try:
        config_flags.DEFINE_config_dataclass(
            "config", Config(), flag_values=values, sys_argv=argv, parse_fn=load
        )
        rest = values(argv)[1:]
    except UserError:
        raise
    except Exception as error:  # of many kinds: what config_flags could not set or parse
        raise UserError(str(error)) from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}\n{usage}")
    for name in required:
        if not (values[name].present and values[name].value):
            raise UserError(f"--{name} is missing\n{usage}")
    if not config_lib.is_utf8(str(values["workdir"].value)):
        raise UserError(f"--workdir={values['workdir'].value!r}: not UTF-8; rename the folder")
    config = cast(Config, values["config"].value)
    config_lib.validate(config)
    return config, values


def _load(path: str) -> Config:
    """What get_config() of a file returns. The file is code, and can raise anything."""
    if not Path(path).is_file():
        raise UserError(
            f"--config={path}: there is no such file; give a Python file, e.g. configs/base.py"
        )
    try:
        names = runpy.run_path(path)
        if "get_config" not in names:
            raise UserError(f"{path}: defines no function get_config()")
        config = names["get_config"]()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        place = f"{path}:{frames[-1].lineno}" if frames else path
        raise UserError(f"{place}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        kind = type(config).__name__
        raise UserError(f"{path}: get_config() must return a Config, not {kind}")
    return config
