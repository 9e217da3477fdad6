"""The commands on the page: how to repeat the ranking, and how to pretrain with its winner."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from tokdiv.ranking import Ranking
from tokdiv.report.page import Command, given_command, repeat_command

NOT_REPEATED = ("device", "workers", "compile")  # settings of the machine, not of the result


def rank_command(folder: Path, ranking: Ranking, config: dict[str, Any]) -> Command:
    """The command line of the run, or the call from Python where it was started from there."""
    if (given := repeat_command(config, "tokdiv")) is not None:
        return given
    used = dataclasses.asdict(ranking.settings)
    settings = {k: v for k, v in used.items() if v is not None and k not in NOT_REPEATED}
    options = "".join(f",\n    {key}={value!r}" for key, value in settings.items())
    note = "From Python, as the run was started."
    if any(teacher.spec.is_custom for teacher in ranking.teachers):
        note += " Modules of your own must be made by your code and take the place of their specs."
    return Command(
        f"import tokdiv\n\nbefore = tokdiv.load_ranking({str(folder)!r})\n"
        f"tokdiv.rank(\n    {ranking.data['source']!r},\n    [teacher.spec for teacher in before.teachers],\n"
        f"    {str(folder) + '-again'!r}{options},\n)",
        note,
    )


def pretrain_command(folder: Path, ranking: Ranking, config: dict[str, Any]) -> Command:
    """How to pretrain with the winner."""
    data, out = ranking.data["source"], ["-o", "runs/pretrain"]
    if not ranking.best.is_custom:
        return Command(
            shlex.join(["img2vec", "pretrain", data, "--teacher", str(folder), *out]),
            "The folder of a ranking stands for its winner.",
        )
    if module := _teacher_module(given_command(config, "tokdiv")):
        return Command(
            shlex.join(["img2vec", "pretrain", data, "--teacher-module", module, *out]),
            "The winner is made by your own code, which is run again. Relative paths hold from the folder where "
            "the ranking was started.",
        )
    return Command(
        f"import img2vec\n\nimg2vec.pretrain({data!r}, teacher=teacher, out='runs/pretrain')",
        f"{ranking.best_name} is a module of your own: pass the Teacher itself, from Python.",
    )


def _teacher_module(words: list[str]) -> str | None:
    """FILE.py:FUNCTION in a command line, the last where there are several."""
    option, found = "--teacher-module", None
    for word, following in zip(words, [*words[1:], ""]):
        if word == option:
            found = following
        elif word.startswith(f"{option}="):
            found = word.removeprefix(f"{option}=")
    return found or None
