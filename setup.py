"""The one thing that `pyproject.toml` cannot say: a wheel carries the fingerprints of its own code.

A run's identity contains a fingerprint of the code. A checkout computes it whenever it is asked; an
image may have another minor version of Python, whose parse tree differs, and keeps the one made
here.
"""

import importlib.util
import json
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCE = Path(__file__).parent / "src" / "medtrain"


class BuildWithFingerprints(build_py):
    """Write `medtrain/_fingerprints.json` into what is built; an editable install has none."""

    def run(self) -> None:
        """Copy the modules, then add the file."""
        super().run()
        identity = SOURCE / "identity.py"
        if self.editable_mode or not identity.is_file():
            return
        # By path: the package itself imports libraries that a build does not have.
        spec = importlib.util.spec_from_file_location("medtrain_identity", identity)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        target = Path(self.build_lib) / "medtrain" / "_fingerprints.json"
        target.write_text(json.dumps(module.fingerprints(SOURCE), indent=1, sort_keys=True) + "\n")


setup(cmdclass={"build_py": BuildWithFingerprints})
