"""Errors that a user can cause, told in one line."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """What is wrong, why, and the way out; the message is all that the user sees."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that tells the defaults of the options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage text."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists all options)")


@contextmanager
def about(thing: object) -> Iterator[None]:
    """Name the thing that a ValueError or OSError inside is about, and show it to the user."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{thing}: {error}") from error
    except OSError as error:
        raise UserError(f"{thing}: {error.strerror or error}") from error


def named(look_up: Callable[[str], T], name: str) -> T:
    """What a name stands for; a ValueError of the look-up is shown to the user as it is."""
    try:
        return look_up(name)
    except ValueError as error:
        raise UserError(str(error)) from error
