"""The page of `fairseq-gradinit report`, and the picture that the quickstart saves (`plot`).

Both need the extra "plot", so nothing is imported here.
"""
