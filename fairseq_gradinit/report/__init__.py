"""The page of `fairseq-gradinit report`.

`runs` reads the scales and effect files of runs, `figures` draws them, `page` puts them into one
HTML file. `plot` has the picture that training itself saves. All but `runs` need the extra "plot",
so nothing is imported here.
"""
