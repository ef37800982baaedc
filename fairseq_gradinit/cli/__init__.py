"""The program `fairseq-gradinit` (`command`), and its subcommand `doctor`."""
