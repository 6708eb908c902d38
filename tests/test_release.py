"""What belongs to a release beside the code: one version, a container recipe, a citation, templates."""

import re
import subprocess
import tomllib

import pytest
import yaml

import flowar
from tests.conftest import ROOT

INSTRUCTIONS = {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "flowar.__version__"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest.groups() == (flowar.__version__, str(citation["date-released"]))
    assert citation["version"] == flowar.__version__ and citation["cff-version"] == "1.2.0"


def test_the_citation_names_both_papers_with_their_authors():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    papers = {paper["url"]: [author["family-names"] for author in paper["authors"]] for paper in citation["references"]}
    assert papers == {
        "https://arxiv.org/abs/2412.15205": ["Ren", "Yu", "He", "Shen", "Yuille", "Chen"],
        "https://arxiv.org/abs/2501.16085": ["Hui", "Zhu", "Yang", "Zhang", "Wang", "Zhou", "Eshraghian", "Xie"],
    }
    assert citation["license"] == "Apache-2.0" and citation["authors"] and citation["message"]


def docker_instructions():
    """Return the (instruction, words) of the Dockerfile, comments left out and lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in joined if line.strip()]


def test_the_container_recipe_is_well_formed_and_not_run_by_root():
    """No test builds it: its instructions are known, its shell commands parse, what it copies and pins is there."""
    instructions = docker_instructions()
    assert instructions[0][0] == "FROM" and {name for name, _ in instructions} <= INSTRUCTIONS
    assert [words for name, words in instructions if name == "USER"] == ["flowar"]
    assert ("ARG", "DEVICE=cuda") in instructions and ("ENTRYPOINT", '["flowar"]') in instructions
    commands = [re.sub(r"--mount=\S+ ", "", words) for name, words in instructions if name == "RUN"]
    for command in commands:
        subprocess.run(["sh", "-n", "-c", command], check=True)
    assert any("-c /opt/flowar/constraints.txt /opt/flowar" in command for command in commands)
    pins = (ROOT / "constraints.txt").read_text()
    program = re.search(r"\$\((sed .*?) /opt/flowar/constraints.txt\)", " ".join(commands))[1]
    chosen = subprocess.run(
        f"{program} {ROOT / 'constraints.txt'}", shell=True, check=True, capture_output=True, text=True
    )
    assert chosen.stdout.split() == [
        f"{name}=={re.search(f'^{name}==(.+)$', pins, re.M)[1]}+cpu" for name in ("torch", "torchvision")
    ]
    ignored = set((ROOT / ".dockerignore").read_text().split())
    assert {".git", ".venv", "runs"} <= ignored
    assert not ignored & {"flowar", "cluster", "data_prep", "configs", "pyproject.toml", "constraints.txt", "README.md"}


@pytest.mark.parametrize("name", ["bug", "result", "idea"])
def test_issue_templates_are_forms_that_the_site_can_show(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"] and form["description"]
    fields = form["body"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["type"] in ("textarea", "input", "dropdown", "checkboxes") for field in fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
