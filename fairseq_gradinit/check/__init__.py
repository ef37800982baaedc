"""`fairseq-gradinit check`: will training without warmup hold, by a few dozen updates of it?

`program` is the subcommand. fairseq is imported only once it runs, so nothing is imported here.
"""
