"""The shape of the code base: what may import what, and what must not load for a help text."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PURE = ("scales", "layers", "model", "flow")
FORBIDDEN = ("torch.distributed", "pathlib", "os", "wandb", "streaming", "safetensors", "huggingface_hub")


def imported_modules(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("name", PURE)
def test_model_code_knows_no_ranks_and_no_files(name):
    imports = imported_modules(ROOT / "flowar" / f"{name}.py")
    assert not [module for module in imports if module.startswith(FORBIDDEN)]
    own = {module for module in imports if module.startswith("flowar.")}
    assert own <= {"flowar.config", "flowar.errors", "flowar.scales", "flowar.layers", "flowar.model"}


def test_flowar_never_imports_cluster():
    for file in (ROOT / "flowar").glob("*.py"):
        assert not [module for module in imported_modules(file) if module.split(".")[0] == "cluster"], file


def test_only_the_environment_knows_what_slurm_calls_things():
    naming = [
        file.name
        for folder in ("flowar", "data_prep", "cluster")
        for file in (ROOT / folder).glob("*.py")
        if "SLURM_" in file.read_text().replace("SLURM_CONF", "")
    ]
    assert naming == ["environment.py"]


def test_only_vae_and_the_demo_vae_script_import_diffusers():
    importing = {
        file.name
        for folder in ("flowar", "data_prep", "cluster")
        for file in (ROOT / folder).glob("*.py")
        if "diffusers" in imported_modules(file)
    }
    assert importing == {"vae.py", "train_demo_vae.py"}


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


def test_flash_attention_is_imported_in_one_place_only_when_asked():
    importing = [file.name for file in (ROOT / "flowar").glob("*.py") if "flash_attn" in imported_modules(file)]
    assert importing == ["layers.py"]
    source = (ROOT / "flowar" / "layers.py").read_text()
    function = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "import_flash_attention"
    )
    assert "from flash_attn" in ast.get_source_segment(source, function)
