"""What is told of an exception.

A sentence where an input, a user's function or the machine is at fault.
"""

from __future__ import annotations

import pathlib
import sysconfig
import traceback

OWN = f"{pathlib.Path(__file__).parent}/"
STDLIB = f"{sysconfig.get_path('stdlib')}/"
LIBRARIES = {"site-packages", "dist-packages"}  # folders, wherever they are
LONGEST = 500  # characters of a message


def user_message(error: BaseException) -> str | None:
    """The fault in one sentence.

    That of a user's function with its file and line, of the machine (OSError), or what the project
    refuses itself. None for a fault of the project's own, which needs its traceback.
    """
    if user_code_line(error):
        return describe(error)
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and frames and frames[-1].filename.startswith(OWN):
        return str(error)
    return one_line(error) if isinstance(error, (OSError, ImportError)) else None


def describe(error: BaseException) -> str:
    """The kind of an exception and its message, after the user's file and line if it has one."""
    place = user_code_line(error)
    return f"{place}: {type_and_message(error)}" if place else type_and_message(error)


def user_code_line(error: BaseException) -> str | None:
    """The innermost line that the project called and that is neither its own nor a library's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = next((i for i, frame in enumerate(frames) if frame.filename.startswith(OWN)), len(frames))
    users = [frame for frame in frames[own:] if _is_users(frame.filename)]
    return f"{users[-1].filename}, line {users[-1].lineno}" if users else None


def type_and_message(error: BaseException) -> str:
    """Its type and message in one line."""
    said = error.msg if isinstance(error, SyntaxError) else one_line(error)
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def one_line(error: BaseException) -> str:
    """Its message in one line."""
    said = " ".join(str(error).split())
    return said if len(said) <= LONGEST else said[:LONGEST] + "..."


def _is_users(file: str) -> bool:
    of_library = file.startswith((OWN, STDLIB, "<"))
    return not of_library and LIBRARIES.isdisjoint(pathlib.PurePath(file).parts)
