"""Lists of jobs: JSON lines or CSV, a row for each job, read into arguments of the command line.

A row names a film, a voice and an output, and settings by the names of the options:

    {"video": "anna.mp4", "audio": "anna-de.wav", "output": "anna-de.mp4", "level": "balanced", "copy-audio": true}

A CSV file has those names in its first row, and an empty cell where a row leaves a setting out. Paths are relative to
the list. What is wrong with a row is an error of that row alone.
"""

import argparse
import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from latentsync.checkpoints.releases import RELEASES
from latentsync.errors import UserError
from latentsync.media.process import check_input
from optim.levels import SWITCHES

MAX_LIST_BYTES = 64 << 20  # 10,000 rows take 2 MB
JSON_SUFFIXES, CSV_SUFFIX = (".jsonl", ".ndjson"), ".csv"
DELIMITERS = ",;\t"  # of CSV: programs of some languages write semicolons
REQUIRED = ("video", "audio", "output")
PATHS = (*REQUIRED, "report", "sound", "prepared", "restore")
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")  # values of a flag in CSV

Values = dict[str, Any]  # of a row, by the names that it gives them


@dataclass(frozen=True)
class Row:
    """A row of a list.

    line: the number of its first line in the file, from 1; values: its settings as text, by their option's name with
    underscores; args: the parsed arguments of its job; error: a sentence about what is wrong with it, in place of both.
    """

    line: int
    values: dict[str, str]
    args: argparse.Namespace | None = None
    error: str | None = None


class RowParser(argparse.ArgumentParser):
    """Raises UserError where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; correct the row.")


def read_list(path: Path, make_parser: Callable[[type[argparse.ArgumentParser]], argparse.ArgumentParser]) -> list[Row]:
    """All rows of a list, in order; blank lines are none.

    make_parser: makes the parser of the command line whose options the rows set. A row with the output of an earlier
    one, or that would overwrite a film or a voice of any row, has an error. Raises UserError where the list itself
    cannot be read.
    """
    lines = _open_lines(path)
    found = _csv_rows(path, lines) if path.suffix.lower() == CSV_SUFFIX else _json_rows(lines)
    parser = make_parser(RowParser)
    defaults = vars(parser.parse_args(["video", "audio", "--output=output"]))
    rows = [_parse_row(line, values, parser, defaults, path.absolute().parent) for line, values in found]
    if not rows:
        raise UserError(f"The list {path} has no rows; write a film, a voice and an output into each.")
    return list(_without_clashes(rows))


def _open_lines(path: Path) -> list[str]:
    """The lines of the file, with their ends. Raises UserError."""
    if path.suffix.lower() not in (*JSON_SUFFIXES, CSV_SUFFIX):
        raise UserError(f"The list {path} does not end in {', '.join((*JSON_SUFFIXES, CSV_SUFFIX))}; rename it.")
    check_input(path, "list")  # a pipe is refused without opening it
    if path.stat().st_size > MAX_LIST_BYTES:
        raise UserError(f"The list {path} has more than {MAX_LIST_BYTES >> 20} MB; divide it.")
    # Names of files may be no text, on Linux: their bytes come through.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = list(file)
    if any("\0" in line for line in lines):
        raise UserError(f"The list {path} is not text in UTF-8; save it with that encoding.")
    return lines


def _json_rows(lines: list[str]) -> Iterator[tuple[int, Values | UserError]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                values = json.loads(line, object_pairs_hook=_unique, parse_constant=_refuse_constant)
                if not isinstance(values, dict):
                    raise UserError('A row is an object, as {"video": "a.mp4", "audio": "a.wav", "output": "out.mp4"}.')
            except UserError as error:
                yield number, error
            except (ValueError, RecursionError) as error:
                yield number, UserError(f"This is not JSON ({getattr(error, 'msg', error)}); correct the row.")
            else:
                yield number, values


def _unique(pairs: list[tuple[str, Any]]) -> Values:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise UserError("A name stands twice in this row; leave one out.")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise UserError(f"{name} is no number that JSON knows; correct the row.")


def _csv_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, Values | UserError]]:
    header = next((line for line in lines if line.strip()), "")
    reader = csv.reader(lines, delimiter=max(DELIMITERS, key=header.count), strict=True)
    names: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield number, UserError(f"This is not CSV ({error}); correct the row.")
            continue
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            keys = [_key(name) for name in names if name]
            missing = [name for name in REQUIRED if name not in keys]
            if missing or len(set(keys)) < len(keys):
                fault = f"lacks a column {missing[0]}" if missing else "names a column twice"
                raise UserError(f"The first row of the list {path} {fault}; begin it with {','.join(REQUIRED)}.")
        elif len(cells) > len(names):
            yield number, UserError(f"This row has {len(cells)} cells, the first one {len(names)}; correct the row.")
        else:
            yield number, dict(zip(names, cells, strict=False))


def _key(name: str) -> str:
    """An option's name as argparse stores its value."""
    return name.strip().removeprefix("--").replace("-", "_").lower()


def _parse_row(
    line: int, found: Values | UserError, parser: argparse.ArgumentParser, defaults: Values, folder: Path
) -> Row:
    """The row with its arguments, or with its error; defaults: values of all options; folder: that of the list."""
    values: dict[str, str] = {}
    try:
        if isinstance(found, UserError):
            raise found
        for name, value in found.items():
            if value is None or value == "":
                continue
            key = _key(name)
            # Other values are lists, as that of several voices, which a row has no place for.
            if key not in defaults or isinstance(defaults[key], list):
                raise UserError(f"There is no setting '{name}'; a row has the names of the options of `sync`.")
            if key in values:
                raise UserError(f"The setting '{name}' stands twice in this row; leave one out.")
            values[key] = _as_text(name, value)
        if missing := [name for name in REQUIRED if name not in values]:
            raise UserError(f"This row has no {' and no '.join(missing)}; add it.")
        return Row(line, values, parser.parse_args(_as_arguments(values, defaults, folder)))
    except UserError as error:
        return Row(line, values, error=str(error))


def _as_text(name: str, value: object) -> str:
    """A value of JSON or CSV as it would be typed. Raises UserError."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, (str, int, float)):
        raise UserError(f"The value of '{name}' is neither text nor a number; correct the row.")
    text = str(value)
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # half of a pair of surrogates
        raise UserError(f"The value of '{name}' holds something that is no character; correct the row.") from None
    return text


def _as_arguments(values: dict[str, str], defaults: Values, folder: Path) -> list[str]:
    """A row's settings as arguments of the command line. Raises UserError."""
    arguments = []
    for key, text in values.items():
        option = f"--{key.replace('_', '-')}"
        if key in PATHS:
            if "\0" in text:
                raise UserError(f"The name of the {key} has a zero byte, which no name can have; correct the row.")
            text = os.path.join(folder, text)
        elif key == "model" and text not in ("auto", "demo", *RELEASES) and (folder / text).is_dir():
            text = os.path.join(folder, text)
        if defaults[key] is False or key in SWITCHES:
            if text.lower() not in YES + NO:
                raise UserError(f"{option} is {text}; give true or false.")
            on = text.lower() in YES
            arguments += [option] if on else [f"--no-{option[2:]}"] if key in SWITCHES else []
        elif key == "silence_gate" and text in ("true", "false"):  # of JSON
            arguments.append(f"{option}={'on' if text == 'true' else 'off'}")
        elif key not in ("video", "audio"):
            arguments.append(f"{option}={text}")
    return [*arguments, *(os.path.join(folder, values[key]) for key in ("video", "audio"))]


def input_files(args: argparse.Namespace) -> list[str]:
    """The files that a row's job reads."""
    return [path for path in (args.video, args.audio, args.sound, args.restore) if path]


def _without_clashes(rows: list[Row]) -> Iterator[Row]:
    """The rows, of which those have an error that would overwrite a file that another one reads or writes."""
    inputs = {_place(path) for row in rows if row.args for path in input_files(row.args)}
    written: dict[str, int] = {}  # to the line of the row
    for row in rows:
        error = None
        paths = [path for path in (row.args.output, row.args.report) if path] if row.args else []
        for path in paths:
            if (place := _place(path)) in written:
                error = f"'{path}' is written by line {written[place]}, too; give each row an output of its own."
            elif place in inputs:
                error = f"'{path}' is a film or a voice of this list and would be overwritten; choose another output."
        if error is None:
            written |= {_place(path): row.line for path in paths}
        yield row if error is None else Row(row.line, row.values, error=error)


def _place(path: str | Path) -> str:
    """The file that a path leads to, to compare."""
    return os.path.normcase(os.path.realpath(path))
