"""What workflows and their pages call exists: options of the commands, parameters, files."""

import re
from pathlib import Path

import click
import pytest

from wsi_pipeline.cli import run, wsi

FOLDER = Path(__file__).parents[1] / "workflows"
NEXTFLOW = FOLDER / "nextflow"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
PAGES = sorted(FOLDER.rglob("README.md"))


def options_of(command):
    return {name for parameter in command.params for name in
            (*parameter.opts, *parameter.secondary_opts) if name.startswith("--")}  # fmt: skip


def without_comments(path):
    mark = {".nf": "//"}.get(path.suffix, "#")
    lines = path.read_text().splitlines()
    return "\n".join(line for line in lines if not line.strip().startswith(mark))


@pytest.mark.parametrize(
    "path",
    [FOLDER / "snakemake" / "Snakefile", NEXTFLOW / "modules" / "wsi.nf"],
    ids=lambda p: p.name,
)
def test_engines_name_options_that_the_commands_have(path):
    named = set(OPTION.findall(without_comments(path)))
    assert {"--out", "--shard", "--check"} <= named
    assert named - options_of(run) - options_of(wsi.commands["summary"]) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_pages_name_commands_and_options_that_exist(page):
    """Lines of code that begin with a command; a backslash goes on in the next line."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in (line.split("#")[0].strip() for line in lines):
        if line.startswith("wsi-run "):
            command: click.Command = run
        elif line.startswith("wsi "):
            command = wsi.commands[line.split()[1]]
            if isinstance(command, click.Group):
                command = command.commands[line.split()[2]]
        else:
            continue
        assert set(OPTION.findall(line)) - options_of(command) == set(), line


def test_nextflow_files_use_parameters_that_are_declared_and_files_that_are_there():
    config = (NEXTFLOW / "nextflow.config").read_text()
    block = re.search(r"^params \{\n(.*?)^\}", config, re.DOTALL | re.MULTILINE)[1]
    declared = set(re.findall(r"^ +(\w+) +=", block, re.MULTILINE))
    text = config + "".join(path.read_text() for path in NEXTFLOW.rglob("*.nf"))
    assert set(re.findall(r"params\.(\w+)", text)) == declared
    page = "\n".join(
        re.findall(r"```sh\n(.*?)```", (NEXTFLOW / "README.md").read_text(), re.DOTALL)
    )
    assert {name[2:] for name in OPTION.findall(page)} - declared == {"drop-maps"}
    included = re.findall(r"from '\./(.*)'", (NEXTFLOW / "main.nf").read_text())
    assert included
    assert all((NEXTFLOW / f"{name}.nf").is_file() for name in included)
    for path in (*NEXTFLOW.rglob("*.nf"), NEXTFLOW / "nextflow.config", NEXTFLOW / "README.md"):
        assert "not run here" in path.read_text()[:200].lower()
