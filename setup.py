"""What pyproject.toml cannot say: where the overlay's modules go, and that the start-up file goes beside them."""

import os

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py


START_UP_FILE = "peft_adadora.pth"


class build_py_with_start_up_file(build_py):
    """Put the start-up file at the root of site-packages; setuptools' own data files reach wheels only."""

    def run(self):
        super().run()
        root = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(root)
        self.copy_file(os.path.join("src", START_UP_FILE), os.path.join(root, START_UP_FILE))

    def get_source_files(self):
        return [*super().get_source_files(), os.path.join("src", START_UP_FILE)]


overlay = find_namespace_packages("src", include=["peft", "peft.*"], exclude=["*.__pycache__"])
overlay = [f"peft_adadora.{package}" for package in overlay]

setup(
    package_dir={"": "src", "peft_adadora.peft": "src/peft"},
    packages=["peft_adadora", *overlay, "peft-stubs", "peft-stubs.tuners.adalora"],
    py_modules=["_peft_adadora", "_peft_adadora_command", "_peft_adadora_newer"],
    cmdclass={"build_py": build_py_with_start_up_file},
)
