"""`python -m fairseq_gradinit` is the program `fairseq-gradinit`."""

import sys

from fairseq_gradinit.cli.command import main

sys.exit(main())
