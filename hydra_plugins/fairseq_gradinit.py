"""Lets fairseq-hydra-train read GradInit's options.

Hydra composes and checks its configuration before fairseq loads the --user-dir, and would refuse
`task.gradinit=true` as unknown. Hydra imports every module of the `hydra_plugins` namespace when
it starts: this one loads the user dir in time, and does nothing in any other program.
"""

import os
import sys
from argparse import Namespace

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import to_absolute_path


class FairseqGradInitSearchPath(SearchPathPlugin):
    """Adds nothing to the search path; it is the earliest moment that Hydra offers."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        program = sys.modules.get("fairseq_cli.hydra_train") or sys.modules["__main__"]
        if not hasattr(program, "_hydra_main") or not hasattr(program, "add_defaults"):
            return
        from fairseq.utils import import_user_module

        for word in sys.argv[1:]:
            option, _, path = word.partition("common.user_dir=")
            if path and not option.strip("+"):
                # Any, since a user dir of one's own may import ours.
                import_user_module(Namespace(user_dir=path))
        add_defaults = program.add_defaults

        def with_user_dir(cfg):
            # Hydra works in a folder of its own by now: a relative user dir still means the one
            # that the program was started in.
            if cfg.common.user_dir and os.path.exists(to_absolute_path(cfg.common.user_dir)):
                cfg.common.user_dir = to_absolute_path(cfg.common.user_dir)
            # Covers a user dir that a configuration file names.
            import_user_module(cfg.common)
            if "fairseq_gradinit.plugin.hook" in sys.modules:
                sys.modules["fairseq_gradinit.plugin.hook"].extend_tasks()
            add_defaults(cfg)

        program.add_defaults = with_user_dir
