"""The `flowar ...` lines of README, docs and YAML headers, and the real parser without the running."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from cluster import commands
from flowar import cli
from flowar.config.jobs import ClusterConfig, FollowConfig, PipelineConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
STARTS = ("flowar", "torchrun", ".venv/bin/flowar")


class Parsed(BaseException):
    """A command line was understood; it holds what was read."""


def snippets(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return [body for kind, body in FENCE.findall(page.read_text()) if kind == language]


class Command(NamedTuple):
    """A command that a page shows."""

    words: list[str]  # after `flowar`
    is_whole: bool  # to be copied; not a mention of a part of one


def commands_of(file: Path) -> Iterator[Command]:
    """Yield every `flowar` command in a page or a YAML file."""
    text = file.read_text()
    blocks = FENCE.sub("", text)
    if file.suffix == ".md":
        lines = [line for body in snippets(file, "bash") for line in body.replace("\\\n", " ").splitlines()]
        lines += [span for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", blocks) if len(span.split()) > 1]
    else:
        lines = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        lines += [span for line in lines for span in re.findall(r"`([^`]+)`", line)]
    for line in lines:
        line = re.sub(r"^The shards: ", "", line.strip())
        if line.startswith(STARTS):
            words = shlex.split(line, comments=True)
            words = words[words.index("flowar") + 1 :] if words[0] == "torchrun" else words[1:]
            left = [word for word in words if not word.endswith("...")]
            if left and not left[0].isupper():
                yield Command(left, left == words and line not in blocks)


def parse(words: list[str]) -> object:
    """Return the settings that a command line gives, by the real parser; what it asks for is not done.

    A YAML file that another command writes counts as empty: what it would say must not be missed.
    """

    def understood(*found: object, **_: object) -> None:
        raise Parsed(*found)

    def read_options(*arguments: object) -> None:
        raise Parsed(cli.parse_options(*arguments))  # type: ignore[arg-type]

    def read_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
        found, unknown = parser.parse_known_args(arguments)
        if unknown:
            parser.error(f"{unknown[0]} is not an option")
        raise Parsed(found)

    with (
        mock.patch.object(cli.Verb, "load", lambda _: understood),
        mock.patch.object(commands, "parse_options", read_options),
        mock.patch.object(argparse.ArgumentParser, "parse_args", read_arguments),
    ):
        try:
            cli.main(words)
        except Parsed as found:
            return load_submitted(found.args[0]) if words[0] == "submit" else found.args[0]
    return None  # help, or a listing


def load_submitted(options: object) -> object:
    """Return the settings of a job and of the cluster that `flowar submit` was given."""
    verb, given = options.verb, list(options.words)  # type: ignore[attr-defined]
    if verb == "evaluate" and given[:1] == ["make-reference"]:
        verb = given.pop(0)
    of_cluster = [word.removeprefix("cluster.") for word in given if word.startswith("cluster.")]
    words = [word for word in given if not word.startswith("cluster.")]
    if options.follow is not None:  # type: ignore[attr-defined]
        schema: type = FollowConfig
    else:
        schema = PipelineConfig if verb == "pipeline" else cli.VERBS[verb].schema
    positionals = () if schema in (FollowConfig, PipelineConfig) else cli.VERBS[verb].positionals
    cluster = cli.parse_words(ClusterConfig, [options.cluster, *of_cluster])  # type: ignore[attr-defined]
    return cli.parse_words(schema, words, positionals), cluster
