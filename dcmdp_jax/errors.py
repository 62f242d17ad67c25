"""Errors as messages: whose fault an exception is, and what to tell the user about it."""

from __future__ import annotations

import pathlib
import sysconfig
import traceback

_PACKAGE = f"{pathlib.Path(__file__).parent}/"
_STDLIB = f"{sysconfig.get_path('stdlib')}/"
_LIBRARIES = {"site-packages", "dist-packages"}  # names of folders
LONGEST = 500  # characters of a message
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in the message of a JaxRuntimeError, which says it alone


def user_message(error: BaseException) -> str | None:
    """Returns a message of one sentence, or None for an error of the project's own.

    A message is returned for an error in a user's function (with its file and line), for one of the
    machine, its memory included, or an import, and for a ValueError that the project raises. An
    error of the project's own needs its traceback.
    """
    if user_code_line(error):
        return describe(error)
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and frames and frames[-1].filename.startswith(_PACKAGE):
        return str(error)
    if isinstance(error, RuntimeError) and OUT_OF_MEMORY in str(error):
        return (
            f"a device has too little memory ({one_line(error)}); dcmdp plan shows what each "
            "program of the experiment needs"
        )
    return one_line(error) if isinstance(error, (OSError, ImportError)) else None


def describe(error: BaseException) -> str:
    """Returns an exception's type and message, after the user's file and line if it has one."""
    line = user_code_line(error)
    return f"{line}: {type_and_message(error)}" if line else type_and_message(error)


def user_code(error: BaseException) -> str:
    """Returns the lines of the user's code that led to an exception, or to its cause, outermost
    first, as a traceback has them; "" if there are none.
    """
    lines = traceback.format_list(_user_frames(error))
    if isinstance(error, SyntaxError):
        *place, _ = traceback.format_exception_only(error)
        lines += place
    if not lines and error.__cause__:
        return user_code(error.__cause__)
    return "".join(lines).rstrip("\n")


def user_code_line(error: BaseException) -> str | None:
    """Returns the file and line of the user's code in which an exception was raised, or None.

    That is the innermost line called by the project that is neither the project's own nor a
    library's.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    users = _user_frames(error)
    return f"{users[-1].filename}, line {users[-1].lineno}" if users else None


def _user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Returns the frames of the user's code that the project called."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [i for i, frame in enumerate(frames) if frame.filename.startswith(_PACKAGE)]
    called = frames[ours[0] :] if ours else []
    return [frame for frame in called if _is_users(frame.filename)]


def type_and_message(error: BaseException) -> str:
    """Returns an exception's type and message on one line."""
    message = error.msg if isinstance(error, SyntaxError) else one_line(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def one_line(error: BaseException) -> str:
    """Returns an exception's message on one line, cut to LONGEST characters."""
    message = " ".join(str(error).split())
    return message if len(message) <= LONGEST else message[:LONGEST] + "..."


def _is_users(file: str) -> bool:
    """Returns True if a file belongs neither to the project nor to a library."""
    is_ours_or_standard = file.startswith((_PACKAGE, _STDLIB, "<"))
    return not is_ours_or_standard and _LIBRARIES.isdisjoint(pathlib.PurePath(file).parts)
