"""Other initialisations than GradInit, each from its paper, as `fairseq-train --init-scheme`."""
