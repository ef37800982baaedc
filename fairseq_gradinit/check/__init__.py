"""`fairseq-gradinit check`: will training without warmup hold, by a few dozen updates of it?

`program` is the subcommand. `probes` makes the updates (by `fairseq_gradinit.plugin.session`) on
the same `batches` and looks at the model between them; `records` is what they keep, `verdict`
decides, `picture` draws. fairseq is imported only once the program runs, so nothing is imported
here.
"""
