"""README, docs and recipes say what the program does: every command is understood by the real parser."""

import ast
import re

import pytest

from flowar.base.errors import UserError
from flowar.config.explain import explain
from flowar.models.build import create_model
from flowar.models.folders import save_model
from tests.commands import PAGES, RECIPES, ROOT, commands_of, parse, snippets
from tests.conftest import tiny_config

COMMANDS = [
    pytest.param(command, id=f"{file.name}: {' '.join(command.words)[:60]}")
    for file in PAGES + RECIPES
    for command in commands_of(file)
]
WRITTEN_BEFORE = ("my/train.yaml", "fashion/train.yaml")  # by another command of the same page
BANNED = re.compile(
    r"\b(?i:mend(s|ed)?|goes on|go on|whoever)\b|\b(is|are) none\b|, which is no \w"
    r"|(?<![Tt]here )\bis no (?!longer|such)\w+"
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the repository's recipes, and a model where the docs have one."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    config = tiny_config()
    save_model(config, create_model(config).state_dict(), folder / "models" / "flowar-l")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    words = [word for word in command.words if word not in WRITTEN_BEFORE]
    is_whole = command.is_whole and words == command.words
    try:
        parse(words)
    except SystemExit as error:
        said = f"{error.code} {capsys.readouterr().err}"
        is_part = not is_whole and re.search("(is|are) required", said)
        assert is_part or (error.code == 0 and "--help" in words), f"flowar {' '.join(words)}: {said}"
    except UserError as error:  # of the settings of a job, which are read apart
        assert not is_whole and "is required" in str(error), f"flowar {' '.join(words)}: {error}"


def test_commands_are_found_and_wrong_ones_are_refused(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    assert len(COMMANDS) > 80
    for words in (["trian"], ["train", "optim.learning_rate=1"], ["submit", "train", "--cluster", "nowhere.yaml"]):
        with pytest.raises((SystemExit, UserError)):
            parse(words)


def test_pythons_snippets_are_python():
    found = [body for page in PAGES for body in snippets(page, "python")]
    assert found
    for body in found:
        ast.parse(body)


def test_the_readme_is_one_that_people_read():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_settings_page_has_every_setting():
    from docs import settings_page  # type: ignore[attr-defined]  # a hook of mkdocs
    from flowar.cli import VERBS

    page = settings_page.on_page_markdown(settings_page.MARK)
    for name, verb in VERBS.items():
        assert f"## flowar {name}" in page
        assert all(f"| `{setting.key}` |" in page for setting in explain(verb.schema) if setting.kind)


def test_the_words_are_those_of_the_field():
    files = [
        *PAGES,
        *RECIPES,
        *(path for top in ("flowar", "cluster", "data_prep", "benchmarks") for path in (ROOT / top).rglob("*.py")),
    ]
    found = [f"{file.relative_to(ROOT)}:{n}: {line.strip()}" for file in files
             for n, line in enumerate(file.read_text().splitlines(), 1) if BANNED.search(line)]  # fmt: skip
    assert not found, "\n".join(found)
