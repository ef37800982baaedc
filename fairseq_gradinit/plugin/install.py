"""What `--user-dir fairseq_gradinit` loads."""

from __future__ import annotations

try:
    import fairseq  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "fairseq":
        raise
    raise ModuleNotFoundError(
        "fairseq is not installed: run `pip install 'fairseq-gradinit[fairseq]'`, which brings "
        "one that fits this Python",
        name="fairseq",
    ) from None

from fairseq_gradinit.plugin import architectures, hook, safe_loading  # noqa: F401

safe_loading.allow_fairseq_checkpoints()
hook.install()
