"""All that touches fairseq: `--user-dir fairseq_gradinit` ends here.

Importing `plugin.install` makes the options, the architectures and the GradInit phase part of this
process's fairseq (`hook` lists the places that change). A run then goes options -> `phase` ->
engine -> scales file. Nothing is imported here: a program that only reads a checkpoint
(`safe_loading`) is to leave fairseq as it is.
"""
