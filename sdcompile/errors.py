"""Every fault a user can cause or meet, and the exit code the command line gives it.

    SdcompileError
    ├── RecipeError      2   the recipe, an option or an argument is wrong
    ├── HostError        3   this machine lacks a library, a device, memory or disk
    ├── StageError       4   a step started and could not finish
    ├── VerifyError      5   an engine does not agree with its reference
    ├── RegressionError  6   a measured figure fell behind its baseline
    └── BundleError      7   a bundle is damaged, too new, or not for this request

`message` says what is, with the value; `hint` says what to do, with the words to type.
Anything else that escapes is our own bug and keeps its traceback.
"""

from __future__ import annotations


class SdcompileWarning(UserWarning):
    """Something the user should know that does not stop the work, such as a prompt that was cut."""


class SdcompileError(Exception):
    """A fault worth explaining: what is wrong (`message`) and what to do about it (`hint`)."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class RecipeError(SdcompileError):
    exit_code = 2


class HostError(SdcompileError):
    exit_code = 3


class StageError(SdcompileError):
    exit_code = 4


class VerifyError(SdcompileError):
    exit_code = 5


class RegressionError(SdcompileError):
    exit_code = 6


class BundleError(SdcompileError):
    exit_code = 7
