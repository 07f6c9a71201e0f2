"""How AdaDoRA is laid over the installed PEFT: installing, starting up, uninstalling, and leaving the rest as it is.

The project is installed into virtual environments of its own, from a copy of the checkout. They see the packages of
the environment that runs the tests, but not its start-up files. Where only the way into the interpreter matters, a
stand-in for PEFT that is imported in no time takes the place of the real one.
"""

import ast
import dataclasses
import ensurepip
import importlib
import json
import os
import pickle
import pkgutil
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest


pytestmark = pytest.mark.overlay

CHECKOUT = Path(__file__).parents[1]
TRAIN_ADALORA = Path(__file__).parent / "overlay_support" / "train_adalora.py"
VARIANTS = [f"{model}-{dtype}" for model in ("linear", "conv1d", "conv2d") for dtype in ("float32", "bfloat16")]

USE_THE_FLAG = "from peft import AdaLoraConfig; AdaLoraConfig(total_step=10, use_dora_adaptive=True)\n"
SPAWN_A_WORKER = """\
import multiprocessing


def use_the_flag():
    from peft import AdaLoraConfig

    AdaLoraConfig(total_step=10, use_dora_adaptive=True)


if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=use_the_flag)
    worker.start()
    worker.join()
    raise SystemExit(worker.exitcode)
"""

HOOK = """\
import sys
from importlib.machinery import PathFinder


class InFront:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path) if name == "peft.tuners.adalora" else None


sys.meta_path.insert(0, InFront)
"""

STAND_IN_CONFIG = """\
from dataclasses import dataclass


@dataclass
class AdaLoraConfig:
    total_step: int
    use_dora: bool = False

    def __post_init__(self):
        pass
"""


def write_stand_in_for_peft(folder, version):
    """Write a package `peft` that has nothing but AdaLoRA's config and a helper, and its metadata."""
    adalora = folder / "peft" / "tuners" / "adalora"
    adalora.mkdir(parents=True)
    (folder / "peft" / "__init__.py").write_text(
        f'__version__ = "{version}"\n\nfrom .tuners.adalora import AdaLoraConfig\n'
    )
    (folder / "peft" / "helpers.py").write_text("def helper():\n    return __name__\n")
    (folder / "peft" / "tuners" / "__init__.py").touch()
    (adalora / "__init__.py").write_text('from .config import AdaLoraConfig\n\n__all__ = ["AdaLoraConfig"]\n')
    (adalora / "config.py").write_text(STAND_IN_CONFIG)
    metadata = folder / f"peft-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: peft\nVersion: {version}\n")
    return folder


@dataclass
class Environment:
    """A virtual environment, and what it takes to run Python and pip in it."""

    folder: Path

    def __post_init__(self):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.folder], check=True)
        bin_folder = "Scripts" if os.name == "nt" else "bin"
        self.python = self.folder / bin_folder / "python"
        self.site_packages = Path(
            self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
        )
        # the interpreter does not look for start-up files in a folder that a start-up file names
        packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.site_packages / "packages_of_the_tests.pth").write_text("\n".join(packages))

    def run(self, *args, python_path=(), check=True):
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environ["HF_HOME"] = str(self.folder / "huggingface")
        environ["HF_HUB_OFFLINE"] = "1"
        if python_path:
            environ["PYTHONPATH"] = os.pathsep.join(map(str, python_path))
        done = subprocess.run(
            [self.python, *args],
            check=False,
            cwd=self.folder,
            env=environ,
            capture_output=True,
            text=True,
            timeout=900,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def pip(self, *args):
        wheels = sysconfig.get_config_var("WHEEL_PKG_DIR") or Path(ensurepip.__file__).with_name("_bundled")
        bundled_pip = next(Path(wheels).glob("pip-*.whl"))
        self.run("-m", "pip", *args, python_path=[bundled_pip])

    def install(self, kind):
        source = copy_checkout(self.folder / "checkout")
        options = {"wheel": [], "editable": ["-e"]}[kind]
        self.pip("install", "--no-deps", "--no-build-isolation", "--ignore-installed", *options, source)
        return self


def copy_checkout(folder):
    """Copy what an installation needs, so that building leaves nothing behind in the checkout."""
    shutil.copytree(CHECKOUT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, folder)
    return folder


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """A folder with a stand-in for a supported PEFT."""
    return write_stand_in_for_peft(tmp_path_factory.mktemp("supported"), "0.21.9")


@pytest.fixture(scope="session")
def unsupported(tmp_path_factory):
    """A folder with a stand-in for an unsupported PEFT."""
    return write_stand_in_for_peft(tmp_path_factory.mktemp("unsupported"), "0.99.0")


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """An environment in which the project is not installed."""
    return Environment(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """An environment after `pip install .`."""
    return Environment(tmp_path_factory.mktemp("wheel")).install("wheel")


@pytest.fixture(scope="session")
def editable(tmp_path_factory):
    """An environment after `pip install -e .`."""
    return Environment(tmp_path_factory.mktemp("editable")).install("editable")


@pytest.fixture(params=["wheel", "editable"])
def installed(request):
    """An environment in which the project is installed one way or the other."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def target_folder(bare, tmp_path_factory):
    """The folder of `pip install --target`."""
    folder = tmp_path_factory.mktemp("target")
    source = copy_checkout(tmp_path_factory.mktemp("target_source") / "checkout")
    bare.pip("install", "--no-deps", "--no-build-isolation", "--target", folder, source)
    return folder


@pytest.fixture(params=["python -S", "pip install --target"])
def run_code_without_start_up_file(request, stand_in):
    """Run code where ours can be imported but its start-up file is not read."""

    def run(code, peft=stand_in, **kwargs):
        if request.param == "python -S":
            wheel = request.getfixturevalue("wheel")
            return wheel.run("-S", "-c", code, python_path=[peft, wheel.site_packages], **kwargs)
        folder = request.getfixturevalue("target_folder")
        return request.getfixturevalue("bare").run("-c", code, python_path=[peft, folder], **kwargs)

    return run


@pytest.mark.project
class TestStartUp:
    def test_the_flag_works_in_a_script_that_imports_nothing_of_ours(self, installed, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(USE_THE_FLAG)
        installed.run(script)

    def test_the_flag_works_in_a_command_line(self, installed, stand_in):
        installed.run("-c", USE_THE_FLAG, python_path=[stand_in])

    def test_the_flag_works_in_a_spawned_worker(self, installed, stand_in, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(SPAWN_A_WORKER)
        installed.run(script, python_path=[stand_in])

    def test_the_flag_works_under_accelerate_launch(self, wheel, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(USE_THE_FLAG)
        wheel.run("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", script)

    def test_the_flag_works_in_a_notebook_kernel(self, wheel, tmp_path):
        pytest.importorskip("ipykernel")
        jupyter_client = pytest.importorskip("jupyter_client")
        kernel = tmp_path / "of_the_environment"
        kernel.mkdir()
        argv = [str(wheel.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": kernel.name}))

        specs = jupyter_client.kernelspec.KernelSpecManager(kernel_dirs=[str(tmp_path)])
        manager = jupyter_client.KernelManager(kernel_name=kernel.name, kernel_spec_manager=specs)
        manager.start_kernel()
        client = manager.blocking_client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=600)
            reply = client.execute_interactive(USE_THE_FLAG, timeout=600)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
        assert reply["content"]["status"] == "ok"

    def test_start_up_imports_neither_torch_nor_peft(self, installed):
        modules = installed.run("-c", "import sys; print(*sys.modules)").stdout.split()
        assert "_peft_adadora" in modules
        assert not {"torch", "peft", "peft_adadora", "_peft_adadora_newer"}.intersection(modules)

    def test_start_up_is_silent_when_warnings_are_errors(self, installed):
        assert installed.run("-W", "error", "-c", "pass").stderr == ""

    def test_the_start_up_file_is_one_plain_import(self, installed):
        assert (installed.site_packages / "peft_adadora.pth").read_text() == "import _peft_adadora\n"


@pytest.mark.project
class TestWithoutStartUpFile:
    def test_the_flag_is_unknown(self, run_code_without_start_up_file):
        done = run_code_without_start_up_file(USE_THE_FLAG, check=False)
        assert "TypeError" in done.stderr and "'use_dora_adaptive'" in done.stderr

    def test_the_flag_works_after_importing_peft_adadora(self, run_code_without_start_up_file):
        run_code_without_start_up_file("import peft_adadora\n" + USE_THE_FLAG)

    def test_importing_peft_adadora_after_peft_says_to_restart_and_import_it_before(
        self, run_code_without_start_up_file
    ):
        done = run_code_without_start_up_file("import peft, peft_adadora", check=False)
        error = done.stderr.splitlines()[-1]
        assert error.startswith("ImportError: ")
        assert "restart Python and import peft_adadora before peft" in error


DOCTOR = "from _peft_adadora_command import main; raise SystemExit(main(['doctor']))"


@pytest.mark.project
class TestDoctor:
    def test_says_that_adadora_is_active(self, installed, stand_in):
        done = installed.run(installed.python.with_name("peft-adadora"), "doctor", python_path=[stand_in])
        assert "AdaDoRA is active in this environment." in done.stdout
        assert "Why" not in done.stdout and "Fix" not in done.stdout
        assert re.search(r"^tested with +peft >=0\.21\.0,<0\.22$", done.stdout, flags=re.MULTILINE)
        assert re.search(r"^peft +0\.21\.9$", done.stdout, flags=re.MULTILINE)

    def test_comes_with_the_report(self, installed, stand_in):
        pytest.importorskip("matplotlib")
        installed.run("-c", "from peft_adadora import figures, read_report", python_path=[stand_in])

    def test_says_so_from_python(self, wheel, stand_in):
        done = wheel.run("-c", "import peft_adadora; print(peft_adadora.doctor().active)", python_path=[stand_in])
        assert done.stdout == "True\n"

    def test_says_which_peft_to_install_instead_of_an_unsupported_one(self, wheel, unsupported):
        done = wheel.run("-c", DOCTOR, python_path=[unsupported], check=False)
        assert done.returncode == 1
        assert "AdaDoRA is not active in this environment." in done.stdout
        assert "Why: peft 0.99.0 is not tested, only peft >=0.21.0,<0.22 is, and its helpers.py differs" in done.stdout
        assert 'Fix: pip install "peft>=0.21.0,<0.22"' in done.stdout

    def test_says_that_peft_is_not_installed(self, wheel):
        done = wheel.run("-S", "-c", DOCTOR, python_path=[wheel.site_packages], check=False)
        assert done.returncode == 1
        assert "Why: PEFT is not installed." in done.stdout

    def test_says_that_start_up_files_are_not_read(self, run_code_without_start_up_file):
        done = run_code_without_start_up_file(DOCTOR, check=False)
        assert done.returncode == 1
        assert "started with -S" in done.stdout or "is no site folder" in done.stdout
        assert "import `peft_adadora` before `peft`" in done.stdout

    def test_says_that_the_start_up_file_is_missing(self, stand_in, tmp_path):
        environment = Environment(tmp_path / "environment").install("wheel")
        (environment.site_packages / "peft_adadora.pth").unlink()
        done = environment.run("-c", DOCTOR, python_path=[stand_in], check=False)
        assert done.returncode == 1
        assert "peft_adadora.pth is missing" in done.stdout
        assert "pip install --force-reinstall --no-deps ." in done.stdout

    def test_says_that_something_else_is_imported_as_peft(self, wheel, tmp_path):
        (tmp_path / "peft.py").touch()
        done = wheel.run("-c", DOCTOR, python_path=[tmp_path], check=False)
        assert done.returncode == 1
        assert f"is not PEFT but {tmp_path / 'peft.py'}" in done.stdout

    def test_says_what_keeps_peft_from_being_imported(self, wheel, stand_in, tmp_path):
        broken = shutil.copytree(stand_in, tmp_path / "broken")
        (broken / "peft" / "__init__.py").write_text("import gone\n")
        done = wheel.run("-c", DOCTOR, python_path=[broken], check=False)
        assert done.returncode == 1
        assert "PEFT cannot be imported (ModuleNotFoundError: No module named 'gone')." in done.stdout

    def test_says_that_another_import_hook_is_in_front(self, wheel, stand_in, tmp_path):
        folder = tmp_path / "hook"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(HOOK)
        done = wheel.run("-c", DOCTOR, python_path=[folder, stand_in], check=False)
        assert done.returncode == 1
        assert "Another import hook" in done.stdout and "InFront" in done.stdout


TYPED = """\
from peft import AdaLoraConfig, LoraConfig
from peft.tuners.adalora import AdaLoraCallback, AdaLoraModel, SVDLinear

config = AdaLoraConfig(init_r=12, target_r=8, total_step=10, target_modules=["q_proj"], use_dora_adaptive=True)
flag: bool = config.use_dora_adaptive
rank: int = config.init_r + LoraConfig(r=8).r
callback = AdaLoraCallback()
"""
MISTYPED = f"{TYPED}AdaLoraConfig(use_dora_adaptiv=True)\n"


@pytest.mark.types
class TestTypes:
    """PEFT says that it is typed, so type checkers would not know of the flag."""

    CHECKERS = ("mypy --follow-imports=silent --python-executable", "basedpyright --level error --pythonpath")

    @pytest.mark.parametrize("checker", CHECKERS, ids=["mypy", "pyright"])
    def test_a_type_checker_knows_the_flag(self, checker, wheel, tmp_path):
        name, *options = checker.split()
        program = Path(sys.executable).with_name(name)
        if not program.exists():
            pytest.skip(f"needs {name}")
        for code, errors in ((TYPED, 0), (MISTYPED, 1)):
            (tmp_path / "typed.py").write_text(code)
            command = [program, *options, wheel.python, "typed.py"]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
            assert done.returncode == errors, done.stdout + done.stderr
            assert ("use_dora_adaptiv" in done.stdout) == bool(errors)

    def test_the_stub_has_the_fields_of_the_config(self):
        stub = ast.parse((CHECKOUT / "src/peft-stubs/tuners/adalora/config.pyi").read_text())
        (config,) = (node for node in stub.body if isinstance(node, ast.ClassDef))
        peft = importlib.import_module("peft")
        inherited = {field.name for field in dataclasses.fields(peft.LoraConfig)} - {"rank_pattern"}
        fields = {field.name for field in dataclasses.fields(peft.AdaLoraConfig)} - inherited
        assert {node.target.id for node in config.body} == fields


@pytest.fixture(scope="module", params=["wheel", "editable"])
def files_and_environment(request, stand_in, tmp_path_factory):
    """The files of site-packages before installing, and the environment after uninstalling."""
    environment = Environment(tmp_path_factory.mktemp("uninstalled"))
    files = set(environment.site_packages.rglob("*"))
    environment.install(request.param)
    environment.run("-c", "import peft_adadora\n" + USE_THE_FLAG, python_path=[stand_in])
    assert set(environment.site_packages.rglob("*")) > files
    environment.pip("uninstall", "-y", "peft-adadora")
    return files, environment


@pytest.mark.project
class TestUninstalling:
    def test_no_file_is_left(self, files_and_environment):
        files, environment = files_and_environment
        assert set(environment.site_packages.rglob("*")) == files

    def test_the_flag_is_unknown_again(self, files_and_environment, stand_in):
        _, environment = files_and_environment
        done = environment.run("-c", USE_THE_FLAG, python_path=[stand_in], check=False)
        assert "TypeError" in done.stderr and "'use_dora_adaptive'" in done.stderr


@pytest.mark.project
class TestUnsupportedPeft:
    def test_importing_it_gives_one_warning_that_names_the_range_and_the_version(self, installed, unsupported):
        code = (
            "import json, warnings\n"
            "with warnings.catch_warnings(record=True) as caught:\n"
            "    warnings.simplefilter('always')\n"
            "    import peft.tuners.adalora\n"
            "print(json.dumps([str(warning.message) for warning in caught]))"
        )
        messages = json.loads(installed.run("-c", code, python_path=[unsupported]).stdout)
        assert len(messages) == 1
        assert ">=0.21.0,<0.22" in messages[0] and "0.99.0" in messages[0]
        assert "refuse use_dora_adaptive as an unknown argument. Install a tested peft" in messages[0]

    def test_it_is_left_as_it_is(self, installed, unsupported):
        code = (
            "import json, peft.tuners.adalora.config\n"
            "adalora = peft.tuners.adalora\n"
            "print(json.dumps([adalora.config.__file__, list(adalora.__path__)]))"
        )
        file, path = json.loads(installed.run("-c", code, python_path=[unsupported]).stdout)
        folder = unsupported / "peft" / "tuners" / "adalora"
        assert (Path(file), list(map(Path, path))) == (folder / "config.py", [folder])

    def test_its_helpers_are_left_as_they_are_without_a_warning_of_their_own(self, wheel, unsupported):
        code = (
            "import json, warnings, peft\n"
            "with warnings.catch_warnings(record=True) as caught:\n"
            "    warnings.simplefilter('always')\n"
            "    import peft.helpers\n"
            "print(json.dumps([peft.helpers.__file__, len(caught)]))"
        )
        file, warnings = json.loads(wheel.run("-c", code, python_path=[unsupported]).stdout)
        assert (Path(file), warnings) == (unsupported / "peft" / "helpers.py", 0)

    @pytest.mark.parametrize("before", ["", "import peft; "], ids=["first", "after peft"])
    def test_importing_peft_adadora_raises_an_error_that_names_the_range(self, installed, unsupported, before):
        done = installed.run("-c", f"{before}import peft_adadora", python_path=[unsupported], check=False)
        error = done.stderr.splitlines()[-1]
        assert error.startswith("ImportError: ")
        assert ">=0.21.0,<0.22" in error and "0.99.0" in error

    def test_importing_peft_adadora_without_any_peft_says_so(self, wheel):
        done = wheel.run("-S", "-c", "import peft_adadora", python_path=[wheel.site_packages], check=False)
        error = done.stderr.splitlines()[-1]
        assert error.startswith("ImportError: ")
        assert ">=0.21.0,<0.22" in error and "PEFT is not installed" in error

    @pytest.mark.parametrize(
        "version, tested",
        [
            ("0.18.1", False),
            ("0.19.1", False),
            ("0.20.0", False),
            ("0.21.0", True),
            ("0.21.2", True),
            ("0.21.3.dev0", True),
            ("0.21.10", True),
            ("0.22.0.dev0", False),
            ("0.22.0", False),
            ("0.210.0", False),
            ("1.21.0", False),
        ],
    )
    def test_the_tested_range_is_0_21(self, version, tested):
        assert importlib.import_module("_peft_adadora").is_tested(version) == tested


@pytest.fixture(scope="session")
def copy_peft(tmp_path_factory):
    """Copy the installed PEFT under another version number, with code appended to some of its files."""

    def copy(version, **appended):
        installed = Path(importlib.import_module("peft").__file__).parent
        folder = tmp_path_factory.mktemp("peft")
        shutil.copytree(installed, folder / "peft")
        init = folder / "peft" / "__init__.py"
        init.write_text(re.sub('(?m)^__version__ = ".*"$', f'__version__ = "{version}"', init.read_text()))
        metadata = folder / f"peft-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: peft\nVersion: {version}\n")
        for module, code in appended.items():
            with open(folder.joinpath("peft", *module.split("__")).with_suffix(".py"), "a") as file:
                file.write(f"\n{code}\n")
        return folder

    return copy


@pytest.fixture(scope="session")
def same_files(copy_peft):
    """A newer PEFT whose AdaLoRA is the tested one."""
    return copy_peft("0.22.0")


@pytest.fixture(scope="session")
def changed_file(copy_peft):
    """A newer PEFT with a change in AdaLoRA."""
    return copy_peft("0.22.0", tuners__adalora__model="# changed")


@pytest.fixture(scope="session")
def changed_behaviour(copy_peft):
    """A newer PEFT whose AdaLoRA is the tested one, but whose LoRA layers compute something else."""
    return copy_peft(
        "0.22.0", tuners__lora__layer="LoraLayer._cast_input_dtype = lambda self, x, dtype: 2 * x.to(dtype)"
    )


USE_AN_UNTESTED_PEFT = """\
import json, sys, warnings
from torch import nn
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft
messages = [str(each.message) for each in caught if "peft-adadora" in str(each.message)]


def attempt(function):
    try:
        function()
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def adapt(**flag):
    return peft.get_peft_model(model, peft.AdaLoraConfig(total_step=10, target_modules=["0"], **flag))


model = nn.Sequential(nn.Linear(4, 4))
errors = [attempt(lambda: adapt(use_dora_adaptive=True)), attempt(lambda: adapt(use_dora_adaptive=True))]
untouched = type(model[0]) is nn.Linear
errors += [attempt(adapt), attempt(lambda: __import__("peft_adadora"))]
print(json.dumps([messages, errors, untouched, "peft.tuners.adalora.stock_layer" in sys.modules]))
"""


@pytest.mark.project
class TestUntestedPeft:
    """On a PEFT of an untested version AdaDoRA is on if the files under our modules are those of a tested one."""

    def test_adadora_is_on_with_one_warning_if_the_files_are_the_same(self, wheel, same_files):
        done = wheel.run("-c", USE_AN_UNTESTED_PEFT, python_path=[same_files])
        (message,), errors, untouched, is_on = json.loads(done.stdout.splitlines()[-1])
        assert "peft 0.22.0 is installed" in message and "AdaDoRA is on" in message
        assert (errors, untouched, is_on) == (["", "", "", ""], False, True)

    @pytest.mark.parametrize("version", ["0.20.0", "0.22.0.dev0", "0.22.0rc1", "1.0.0"])
    @pytest.mark.parametrize("changed", ["", "helpers.py"])
    def test_only_the_files_count_whatever_the_version_is(self, installed, newer, tmp_path, version, changed):
        write_stand_in_for_peft(tmp_path, version)
        copy_compared_files(newer, tmp_path / "peft")
        if changed:
            (tmp_path / "peft" / changed).write_text("# changed")
        (tmp_path / "peft" / "__init__.py").write_text(f'__version__ = "{version}"\n')
        code = (
            "import json, warnings\n"
            "from importlib.util import find_spec\n"
            "with warnings.catch_warnings(record=True) as caught:\n"
            "    warnings.simplefilter('always')\n"
            "    names = ('peft.helpers', 'peft.tuners.adalora', 'peft.tuners.mixed.model')\n"
            "    origins = [find_spec(name).origin for name in names]\n"
            "print(json.dumps([origins, [str(each.message) for each in caught]]))"
        )
        origins, (message,) = json.loads(installed.run("-c", code, python_path=[tmp_path]).stdout)
        assert f"peft {version} is installed" in message
        assert ("AdaDoRA is off" if changed else "AdaDoRA is on") in message
        assert {Path(origin).is_relative_to(tmp_path) for origin in origins} == {bool(changed)}
        done = installed.run("-c", "import peft_adadora", python_path=[tmp_path], check=False)
        assert done.returncode == bool(changed)

    def test_adadora_is_off_if_a_file_differs(self, wheel, changed_file):
        done = wheel.run("-c", USE_AN_UNTESTED_PEFT, python_path=[changed_file])
        (message,), errors, _, is_on = json.loads(done.stdout.splitlines()[-1])
        reason = "peft 0.22.0 is installed and its tuners/adalora/model.py differs from the tested one"
        assert reason in message and "AdaDoRA is off" in message
        assert "unexpected keyword argument 'use_dora_adaptive'" in errors[0]
        assert errors[2] == ""
        assert errors[3].startswith(f"ImportError: {reason}") and 'pip install "peft>=0.21.0,<0.22"' in errors[3]
        assert not is_on

    def test_an_adapter_is_refused_if_its_values_are_wrong_and_plain_adalora_works(self, wheel, changed_behaviour):
        done = wheel.run("-c", USE_AN_UNTESTED_PEFT, python_path=[changed_behaviour])
        _, errors, untouched, is_on = json.loads(done.stdout.splitlines()[-1])
        assert errors[0] == errors[1]
        assert errors[0] == (
            "RuntimeError: AdaDoRA does not work with peft 0.22.0, which was not tested: the output differs from "
            'the formula. Install a tested version: pip install "peft>=0.21.0,<0.22"'
        )
        assert (errors[2:], untouched, is_on) == (["", ""], True, True)

    @pytest.mark.parametrize(
        "make",
        [
            "SVDLinear(nn.Linear(4, 4), 'default', config, r=2, lora_alpha=3)",
            "SVDConv2d(nn.Conv2d(4, 4, 1), 'default', config, r=2, lora_alpha=3)",
            "peft.inject_adapter_in_model(config, model)",
            "peft.get_peft_model(model, config, mixed=True)",
            "peft.PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)",
        ],
    )
    def test_no_adapter_is_made_without_the_check(self, newer, monkeypatch, tmp_path, make):
        import torch

        import peft
        from peft.tuners.adalora import SVDConv2d, SVDLinear, layer, supported_layers

        def differ():
            raise ValueError("it is a test")

        config = peft.AdaLoraConfig(total_step=10, target_modules=["0"], use_dora_adaptive=True)
        peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config).save_pretrained(tmp_path)
        monkeypatch.setattr(newer, "_passed", False)
        monkeypatch.setattr(newer, "follows_formula", differ)
        for module in (layer, supported_layers):
            monkeypatch.setattr(module, "check_magnitude_support", module.check_magnitude_support)
        newer.check_before_first_adapter(layer, supported_layers)
        names = {
            "SVDConv2d": SVDConv2d,
            "SVDLinear": SVDLinear,
            "config": config,
            "folder": tmp_path,
            "model": torch.nn.Sequential(torch.nn.Linear(4, 4)),
            "nn": torch.nn,
            "peft": peft,
        }
        with pytest.raises(RuntimeError, match="does not work with peft .*: it is a test. Install"):
            eval(make, names)

    def test_the_doctor_says_why_adadora_is_on(self, wheel, same_files):
        done = wheel.run("-c", DOCTOR, python_path=[same_files])
        assert "AdaDoRA is active in this environment." in done.stdout
        assert re.search(
            r"^tested with +peft >=0\.21\.0,<0\.22, not 0\.22\.0, but the files that AdaDoRA overrides are the same, "
            "and the check of its values passes$",
            done.stdout,
            flags=re.MULTILINE,
        )

    def test_the_doctor_says_that_values_are_wrong(self, wheel, changed_behaviour):
        done = wheel.run("-c", DOCTOR, python_path=[changed_behaviour], check=False)
        assert done.returncode == 1
        assert "AdaDoRA is not active in this environment." in done.stdout
        assert "Why: AdaDoRA does not work with peft 0.22.0" in done.stdout
        assert "the output differs from the formula" in done.stdout
        assert 'Fix: pip install "peft>=0.21.0,<0.22"' in done.stdout

    def test_a_tested_peft_is_neither_compared_nor_checked(self, wheel, stand_in):
        code = "import sys, peft.tuners.adalora, peft_adadora; print('_peft_adadora_newer' in sys.modules)"
        assert wheel.run("-c", code, python_path=[stand_in]).stdout == "False\n"


@pytest.fixture
def newer():
    return importlib.import_module("_peft_adadora_newer")


def copy_compared_files(newer, folder):
    for name in newer.TESTED_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(importlib.import_module("peft").__file__).parent / name, folder / name)


class TestFilesOfPeft:
    """Which files are compared on a PEFT of an untested version."""

    @pytest.fixture
    def folder(self, newer, tmp_path):
        """A folder with those files of the installed PEFT."""
        copy_compared_files(newer, tmp_path)
        return tmp_path

    def test_they_are_the_modules_under_ours_and_beside_ours(self, newer):
        peft = importlib.import_module("peft")
        overlay, installed = importlib.import_module("_peft_adadora"), Path(peft.__file__).parent
        assert overlay.is_tested(peft.__version__)
        expected = set()
        for name in overlay.OVERLAID:
            path = installed.parent.joinpath(*name.split("."))
            expected.update(path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")])
        expected.remove(installed / "optimizers" / "lorafa.py")  # to which ours only adds a refusal
        assert {installed / name for name in newer.TESTED_FILES} == expected

    def test_those_of_the_installed_peft_are_the_tested_ones(self, newer):
        assert newer.file_difference(str(Path(importlib.import_module("peft").__file__).parent)) is None

    @pytest.mark.parametrize("index", range(8))
    def test_a_change_in_any_of_them_is_found(self, newer, folder, index):
        name = list(newer.TESTED_FILES)[index]
        (folder / name).write_text((folder / name).read_text() + "# changed\n")
        assert newer.file_difference(str(folder)) == f"its {name} differs from the tested one"

    def test_the_line_endings_of_windows_make_no_difference(self, newer, folder):
        for name in newer.TESTED_FILES:
            (folder / name).write_bytes((folder / name).read_bytes().replace(b"\n", b"\r\n"))
        assert newer.file_difference(str(folder)) is None

    def test_compiled_and_hidden_files_make_no_difference(self, newer, folder):
        (folder / "tuners/adalora/__pycache__").mkdir()
        (folder / "tuners/adalora/.layer.py.swp").touch()
        assert newer.file_difference(str(folder)) is None

    @pytest.mark.parametrize("new", ["callback.py", "variants/__init__.py"])
    def test_a_new_module_that_ours_could_hide_is_found(self, newer, folder, new):
        path = folder / "tuners/adalora" / new
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert newer.file_difference(str(folder)) == f"its tuners/adalora/{new.split('/')[0]} is new"

    def test_a_missing_file_counts_as_a_difference(self, newer, folder):
        (folder / "tuners/mixed/model.py").unlink()
        assert newer.file_difference(str(folder)).startswith("its files cannot be compared (FileNotFoundError: ")

    def test_a_peft_in_an_archive_counts_as_different(self, newer, folder, tmp_path_factory):
        archive = shutil.make_archive(str(tmp_path_factory.mktemp("archive") / "peft"), "zip", folder)
        assert newer.file_difference(archive).startswith("its files cannot be compared (NotADirectoryError: ")


@contextmanager
def default_device(device):
    import torch

    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def fast_products():
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


SURROUNDINGS = {
    "nothing": "nullcontext()",
    "no_grad": "torch.no_grad()",
    "inference mode": "torch.inference_mode()",
    "device meta": "torch.device('meta')",
    "device cuda": "torch.device('cuda')",
    "default device meta": "default_device('meta')",
    "default device cuda": "default_device('cuda')",
    "default dtype bfloat16": "default_dtype('bfloat16')",
    "default dtype float64": "default_dtype('float64')",
    "autocast": "torch.autocast('cpu', dtype=torch.bfloat16)",
    "fast products": "fast_products()",
    "DoraCaching": "DoraCaching()",
    "fake tensors": "FakeTensorMode()",
}


class TestCheckOfValues:
    """The check of a small adapter before the first one, on a PEFT of an untested version."""

    @pytest.fixture(autouse=True)
    def not_yet_passed(self, newer, monkeypatch):
        monkeypatch.setattr(newer, "_passed", False)

    @pytest.fixture
    def comparisons(self, newer, monkeypatch):
        """The comparisons that have been started."""
        started, compare = [], newer.follows_formula
        monkeypatch.setattr(newer, "follows_formula", lambda: started.append(compare) or compare())
        return started

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("surroundings", SURROUNDINGS)
    def test_passes_anywhere_and_leaves_no_trace(self, newer, surroundings):
        import random

        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        from peft.helpers import DoraCaching

        names = {"nullcontext": nullcontext, "torch": torch, "DoraCaching": DoraCaching, **globals()}
        context = eval(SURROUNDINGS[surroundings], {**names, "FakeTensorMode": FakeTensorMode})
        before = torch.get_rng_state(), random.getstate()
        with context:
            settings = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
            newer.check_values()
            assert settings == (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
        assert newer._passed
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]

    def test_passes_in_a_compiled_function(self, newer):
        import torch

        @torch.compile(backend="eager")
        def function(x):
            newer.check_values()
            return x.sin()

        assert torch.equal(function(torch.ones(3)), torch.ones(3).sin())
        assert newer._passed

    def test_waits_for_the_next_adapter_while_modules_are_made_without_values(self, newer, comparisons):
        accelerate = importlib.import_module("accelerate")
        with accelerate.init_empty_weights():
            newer.check_values()
        assert not newer._passed
        newer.check_values()
        assert newer._passed and len(comparisons) == 2

    def test_runs_once_in_a_process_with_threads(self, newer, comparisons):
        threads = [threading.Thread(target=newer.check_values) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert newer._passed and len(comparisons) == 1

    @pytest.mark.parametrize(
        "place, change, difference",
        [
            (
                "peft.tuners.lora.layer.LoraLayer._cast_input_dtype",
                lambda _: lambda self, x, dtype: 2 * x.to(dtype),
                "the output differs from the formula",
            ),
            (
                "peft.tuners.lora.layer.LoraLayer._cast_input_dtype",
                lambda _: lambda self, x: x,
                ".* takes 2 positional arguments but 3 were given",
            ),
            (
                "peft.tuners.adalora.variants.row_norm",
                lambda original: lambda weight: 2 * original(weight),
                "the magnitude of a new adapter differs from the formula",
            ),
            (
                "peft.get_peft_model_state_dict",
                lambda original: lambda model: {key: 2 * value for key, value in original(model).items()},
                "the output of a loaded adapter differs from the formula",
            ),
            (
                "peft.set_peft_model_state_dict",
                lambda _: lambda model, weights: None,
                "the output of a loaded adapter differs from the formula",
            ),
            (
                "peft.tuners.adalora.layer.merge_adapter",
                lambda _: lambda layer, adapter_name, safe_merge: None,
                "the merged weight differs from the formula",
            ),
        ],
    )
    def test_names_the_first_difference_and_says_what_to_do(self, newer, monkeypatch, place, change, difference):
        owner, _, name = place.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        monkeypatch.setattr(owner, name, change(getattr(owner, name)))
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=f"which was not tested: {difference}. Install a tested version: pip"
            ):
                newer.check_values()
        assert not newer._passed


@pytest.mark.project
class TestModuleOutsideOfAdaLora:
    """A single module of PEFT, such as `peft.helpers`, is overridden like a module of `peft.tuners.adalora`."""

    @pytest.mark.parametrize("kind, folder", [("wheel", "peft_adadora/peft"), ("editable", "checkout/src/peft")])
    def test_ours_and_the_installed_one_are_found_after_installing(self, request, kind, folder, stand_in):
        environment = request.getfixturevalue(kind)
        root = environment.site_packages if kind == "wheel" else environment.folder
        code = (
            "from importlib.util import find_spec\n"
            "print(find_spec('peft.helpers').origin, find_spec('peft.stock_helpers').origin)"
        )
        ours, stock = environment.run("-c", code, python_path=[stand_in]).stdout.split()
        assert (Path(ours), Path(stock)) == (root / folder / "helpers.py", stand_in / "peft" / "helpers.py")

    def test_ours_has_every_name_of_the_installed_one(self, monkeypatch):
        import peft
        from peft import helpers, stock_helpers

        assert Path(stock_helpers.__file__) == Path(peft.__file__).with_name("helpers.py")
        assert Path(helpers.__file__) != Path(stock_helpers.__file__)
        assert vars(helpers).keys() >= vars(stock_helpers).keys()
        assert peft.find_kappa_target_modules is helpers.find_kappa_target_modules
        monkeypatch.setattr(stock_helpers, "_left_out_by_a_star", object(), raising=False)
        assert helpers._left_out_by_a_star is stock_helpers._left_out_by_a_star
        with pytest.raises(ImportError, match="cannot import name 'gone' from 'peft.helpers'"):
            from peft.helpers import gone  # noqa: F401

    def test_an_installed_one_that_was_imported_before_stays(self, wheel, stand_in):
        code = (
            "import peft.helpers as before\n"
            "import _peft_adadora, peft.stock_helpers\n"
            "import peft.helpers as after\n"
            "assert before is after\n"
            "print(after.helper(), peft.stock_helpers.helper())"
        )
        done = wheel.run("-S", "-c", code, python_path=[stand_in, wheel.site_packages])
        assert done.stdout == "peft.helpers peft.stock_helpers\n"


class TestModulesOfPeft:
    @pytest.mark.parametrize("name", ["SVDLinear", "SVDConv2d", "SVDQuantLinear", "SVDLinear8bitLt", "SVDLinear4bit"])
    def test_every_layer_class_is_an_adalora_layer_of_ours(self, name):
        if name.endswith(("bit", "bitLt")):
            pytest.importorskip("bitsandbytes")
        from peft.tuners import adalora

        assert adalora.AdaLoraLayer.__module__ == "peft.tuners.adalora.layer"
        assert "lora_magnitude" in adalora.AdaLoraLayer.adapter_layer_names
        assert issubclass(getattr(adalora, name), adalora.AdaLoraLayer)

    def test_the_registry_of_peft_holds_our_classes(self):
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
        from peft.tuners.adalora.config import AdaLoraConfig
        from peft.tuners.adalora.model import AdaLoraModel

        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ADALORA] is AdaLoraConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ADALORA] is AdaLoraModel

    @pytest.mark.parametrize("name", ["AdaLoraConfig", "AdaLoraModel"])
    def test_peft_and_its_submodules_export_the_same_class(self, name):
        import peft

        assert getattr(peft, name) is getattr(peft.tuners, name) is getattr(peft.tuners.adalora, name)

    @pytest.mark.parametrize(
        "module", [".gptq", ".stock___init__", ".stock_bnb", ".stock_config", ".stock_layer", ".stock_model"]
    )
    def test_modules_without_an_override_and_stock_modules_are_those_of_the_installed_peft(self, module):
        import peft

        installed = Path(peft.__file__).parent / "tuners" / "adalora"
        assert Path(importlib.import_module("peft.tuners.adalora" + module).__file__).parent == installed

    @pytest.mark.parametrize("module", ["bnb", "config", "layer", "model"])
    def test_a_stock_module_is_what_the_module_would_be_without_ours(self, module):
        stock = importlib.import_module(f"peft.tuners.adalora.stock_{module}")
        ours = importlib.import_module(f"peft.tuners.adalora.{module}")
        assert Path(stock.__file__).name == Path(ours.__file__).name
        assert Path(stock.__file__) != Path(ours.__file__)

    def test_a_config_can_be_pickled(self):
        from peft import AdaLoraConfig

        config = AdaLoraConfig(total_step=10, use_dora_adaptive=True)
        assert pickle.loads(pickle.dumps(config)) == config

    @pytest.mark.parametrize("name", ["AdaLoraModel", "SVDLinear", "SVDConv2d", "RankAllocator"])
    def test_a_class_can_be_pickled(self, name):
        from peft.tuners import adalora

        cls = getattr(adalora, name)
        assert pickle.loads(pickle.dumps(cls)) is cls


@pytest.fixture(scope="module")
def training_folders(tmp_path_factory):
    """What the training script writes with AdaDoRA installed, and when it is kept out."""
    with_adadora, without_adadora = tmp_path_factory.mktemp("with"), tmp_path_factory.mktemp("without")
    subprocess.run([sys.executable, TRAIN_ADALORA, with_adadora], check=True, timeout=900)
    subprocess.run([sys.executable, TRAIN_ADALORA, without_adadora, "--without-adadora"], check=True, timeout=900)
    return with_adadora, without_adadora


class TestFlagOff:
    """With the flag off everything is PEFT's own AdaLoRA, bit for bit."""

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize(
        "result",
        [
            "losses.txt",
            "trained.safetensors",
            "adapter_model.safetensors",
            "output.safetensors",
            "merged.safetensors",
            "unmerged.safetensors",
            "next_random_numbers.safetensors",
        ],
    )
    def test_the_results_are_those_without_adadora(self, training_folders, variant, result):
        ours, stock = (folder / variant / result for folder in training_folders)
        assert ours.read_bytes() == stock.read_bytes()

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_the_saved_config_differs_in_our_options_only(self, training_folders, variant):
        ours, stock = (
            json.loads((folder / variant / "adapter_config.json").read_text()) for folder in training_folders
        )
        assert ours == {**stock, "use_dora_adaptive": False, "orth_reg_decoupled": False}


def test_peft_without_adadora_refuses_an_adadora_adapter(tmp_path):
    from torch import nn

    from peft import AdaLoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(3, 4))
    config = AdaLoraConfig(total_step=10, target_modules=["0"], use_dora_adaptive=True)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    code = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__module__ != "_peft_adadora"]
from torch import nn
from peft import PeftModel
PeftModel.from_pretrained(nn.Sequential(nn.Linear(3, 4)), sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "adapter"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ADALORA does not support DoRA" in done.stderr.splitlines()[-1]
