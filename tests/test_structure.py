"""The shape of the code base: which way imports run, where a word is defined, what must not load for a help text."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from flowar.models.family import Family

ROOT = Path(__file__).parents[1]
PACKAGES = ("flowar", "cluster", "data_prep")
VERBS = "verbs"
# From the lowest to the highest; a file imports from its own layer and lower ones. Those in one row don't meet.
LAYERS = [
    {"flowar.base"},
    {"flowar.config"},
    {"flowar.latents"},
    {"flowar.models"},
    {"flowar.sampling", "flowar.training"},
    {"flowar.evaluation", "flowar.planning"},
    {VERBS},
    {"data_prep", "cluster"},
]
FLOOR = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}
PUBLIC_API = "flowar/__init__.py"  # names modules as strings; importing it loads none of them
MODEL_FILES = (
    "models/attention", "models/layers", "models/flowar/scales", "models/flowar/model", "models/flowar/loss",
    "models/arflow/linear_attention", "models/arflow/model", "models/arflow/loss",
)  # fmt: skip
NOT_FOR_MODELS = ("torch.distributed", "pathlib", "os", "wandb", "streaming", "safetensors", "huggingface_hub")
MOST_LINES = 450
FAMILY_FOLDER = r"flowar/models/\w+/"
COMMON_WORDS = {"main"}  # the function of a verb or a script; may be defined in more than one file
FAMILY_WORDS = {name for name in vars(Family) if not name.startswith("_")}  # in every folder of flowar/models/


def source_files(*packages: str) -> list[Path]:
    """Return the Python files of some packages, in all their folders."""
    files = [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > len(packages)
    return files


def name_of(file: Path, root: Path = ROOT) -> str:
    """Return a file's path below the root."""
    return file.relative_to(root).as_posix()


def imported_modules(source: str) -> set[str]:
    """Return all modules that a source imports, anywhere in it, and the modules or names that it takes from them."""
    tree = ast.parse(source)
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def room_of(module: str) -> str | None:
    """Return the room of a module: a folder of flowar/, the verbs, or one of the other packages; None: not ours."""
    first, _, rest = module.partition(".")
    if first != "flowar":
        return first if first in PACKAGES else None
    folder = rest.split(".")[0]
    if f"flowar.{folder}" in FLOOR:
        return f"flowar.{folder}"
    return VERBS if (ROOT / "flowar" / f"{folder}.py").is_file() else None


def forbidden_imports(name: str, source: str) -> list[str]:
    """Return what a file of this name must not import: higher rooms, others of its row, other verbs."""
    room = room_of(name.removesuffix(".py").replace("/", "."))
    if room is None:
        return []
    wrong = []
    for module in sorted(imported_modules(source)):
        other = room_of(module)
        if other is None:
            continue
        is_higher = FLOOR[other] > FLOOR[room] or (FLOOR[other] == FLOOR[room] and other != room)
        is_other_verb = room == other == VERBS and module.startswith("flowar.") and not module.startswith("flowar.cli")
        if is_higher or is_other_verb:
            wrong.append(module)
    return wrong


def test_imports_run_only_downwards():
    found = {name_of(file): forbidden_imports(name_of(file), file.read_text()) for file in source_files(*PACKAGES)}
    assert {name: wrong for name, wrong in found.items() if wrong and name != PUBLIC_API} == {}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("flowar/base/files.py", "from flowar.config.load import free"),
        ("flowar/config/data.py", "import flowar.latents.schema"),
        ("flowar/models/build.py", "from flowar.training.step import accumulate"),
        ("flowar/sampling/job.py", "from flowar.training import averages"),
        ("flowar/evaluation/page.py", "from flowar.sample import main"),
        ("flowar/demo.py", "from flowar import train"),
        ("flowar/demo.py", "    from data_prep import encode"),
        ("data_prep/check.py", "from cluster.status import find_jobs"),
    ],
)
def test_a_forbidden_import_anywhere_is_seen(name, line):
    source = (ROOT / name).read_text()
    assert forbidden_imports(name, source) == []
    planted = f"{source}\n\ndef _planted():\n    {line.strip()}\n"
    assert forbidden_imports(name, planted) != []


def test_no_two_files_import_each_other():
    names = {name_of(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in
             source_files(*PACKAGES)}  # fmt: skip
    arrows = {}
    for file in source_files(*PACKAGES):
        name = name_of(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        arrows[name] = (imported_modules(file.read_text()) & names) - {name, "flowar"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(arrows):
        visit(name, ())


def names_flowars_inside(source: str) -> list[str]:
    """Return where a source knows what only the family's own files may: its classes, its modules, its settings."""
    tree, found = ast.parse(source), []
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            word = node.id if isinstance(node, ast.Name) else node.attr
            if word in ("FlowAR", "HubFlowAR", "scales", "patch_size", "lower_blocks", "upper_blocks", "token_width"):
                found.append(f"line {node.lineno}: {word}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_inside = re.search(r"^(flow|ar)\.|loss/scale_|\bscales\b", node.value)
            if is_inside and id(node) not in docstrings:
                found.append(f"line {node.lineno}: {node.value[:40]!r}")
    modules = {module for module in imported_modules(source) if module.startswith("flowar.models.flowar")}
    return found + sorted(modules)


def test_only_the_family_itself_knows_flowars_inside():
    """Outside of models/flowar/: the table of families, the public API, and the settings of the family's models."""
    allowed = {PUBLIC_API, "flowar/models/build.py", "flowar/config/models.py"}
    found = {
        name_of(file): inside
        for file in source_files(*PACKAGES)
        if not re.match(FAMILY_FOLDER, name_of(file)) and (inside := names_flowars_inside(file.read_text()))
    }
    assert {name: inside for name, inside in found.items() if name not in allowed} == {}
    for file in source_files("flowar/models"):  # a family knows no other one
        others = {module.split(".")[2] for module in imported_modules(file.read_text()) if "flowar.models." in module}
        if family := re.match(FAMILY_FOLDER, name_of(file)):
            assert not (others & {"flowar", "arflow"}) - {family[0].split("/")[2]}, name_of(file)
    assert names_flowars_inside("def f(model):\n    return model.config.scales") == ["line 2: scales"]
    assert names_flowars_inside('name.startswith("flow.")') == ["line 1: 'flow.'"]


def defined_words(source: str) -> set[str]:
    """Return the public functions, classes and constants at the top level of a source."""
    words = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            words.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            words |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {word for word in words if not word.startswith("_")}


def test_a_word_is_defined_once():
    homes = defaultdict(list)
    for file in source_files(*PACKAGES):
        for word in defined_words(file.read_text()):
            homes[word].append(name_of(file))
    for word in FAMILY_WORDS:
        homes[word] = [name for name in homes[word] if not re.match(FAMILY_FOLDER, name)]
    assert {word: files for word, files in homes.items() if len(files) > 1 and word not in COMMON_WORDS} == {}


def test_no_file_is_too_long_to_hold_one_idea():
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in source_files(*PACKAGES, "tests")}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


@pytest.mark.parametrize("name", MODEL_FILES)
def test_model_code_knows_no_ranks_and_no_files(name):
    imports = imported_modules((ROOT / "flowar" / f"{name}.py").read_text())
    assert not [module for module in imports if module.startswith(NOT_FOR_MODELS)]
    ours = {module for module in imports if module.startswith("flowar.")}
    allowed = ("flowar.config", "flowar.base.errors", "flowar.models")
    assert not [module for module in ours if not module.startswith(allowed)]


def test_only_the_environment_knows_what_slurm_calls_things():
    naming = [
        name_of(file) for file in source_files(*PACKAGES) if "SLURM_" in file.read_text().replace("SLURM_CONF", "")
    ]
    assert naming == ["cluster/environment.py"]


@pytest.mark.parametrize(
    ("library", "files"),
    [
        (
            "diffusers",
            [
                "flowar/latents/vae.py",
                "flowar/latents/ldm.py",
                "flowar/pipeline.py",
                "data_prep/autoencoder.py",
                "data_prep/train_demo_vae.py",
            ],
        ),
        ("deepspeed", ["flowar/training/zero_engine.py"]),
        ("flash_attn", ["flowar/models/attention.py"]),
    ],
)
def test_a_library_is_imported_in_one_place(library, files):
    importing = [
        name_of(file)
        for file in source_files(*PACKAGES)
        if any(module.split(".")[0] == library for module in imported_modules(file.read_text()))
    ]
    assert sorted(importing) == sorted(files)


def test_flash_attention_is_imported_only_when_asked():
    tree = ast.parse((ROOT / "flowar" / "models" / "attention.py").read_text())
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert "flash_attn" not in top | {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "no_such_setting=1"]])
def test_help_and_config_errors_do_not_import_torch(arguments):
    code = (
        "import sys, flowar.cli\n"
        "try: flowar.cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'streaming', 'diffusers', 'wandb'} & set(sys.modules), sorted(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
