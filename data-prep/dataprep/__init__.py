"""Makes a parallel corpus ready for fairseq out of files that anybody can fetch.

One module for each concept: `corpora` (the table: what is fetched, under which licence, how it is
cleaned and split), `wheels` and `downloads` (fetching and checking), `readers` (from message
catalogues or text files to aligned pairs), `cleaning` (normalisation and named filters),
`splitting` (held-out sets without leakage, and how much published ones have), `subwords` (the joint
vocabulary), `steps` (resumable steps) and `pipeline` (all of it, in order).
"""


class DataPrepError(Exception):
    """A fault that the user can mend; its text is one or two sentences that say how."""
