"""Makes a parallel corpus ready for fairseq out of files that anybody can fetch.

One module for each concept: `corpora` (the table: what is fetched, under which licence, how it is
cleaned and split), `wheels` (fetching and checking), `readers` (from message catalogues to aligned
pairs), `cleaning` (normalisation and named filters), `splitting` (held-out sets without leakage),
`subwords` (the joint vocabulary), `steps` (resumable steps) and `pipeline` (all of it, in order).
"""


class DataPrepError(Exception):
    """A fault that the user can mend; its text is one or two sentences that say how."""
