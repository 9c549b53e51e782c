"""The vision tower, its merger, and where their outputs and positions go in the text.

Names are those of transformers' modeling_qwen3_5. A grid is the number of frames, rows and columns
of an image's patches, ``(t, h, w)``; the patches of every ``m`` x ``m`` block (``m`` the merge
size) follow one another, and so do the blocks of a frame, row by row.
"""
