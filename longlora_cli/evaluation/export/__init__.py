"""Finished evaluations as the files of other programs: pure functions from results and rows to texts by path.

What a file of theirs has and an evaluation does not know is left out, never made up.
"""
