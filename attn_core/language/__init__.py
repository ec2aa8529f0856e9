"""The language of masks and scores: one small algebra, many readings.

tree      what a mask or score is: a static straight-line programme
expr      what its Python function sees while it is traced
answered  what torch.compile answers in an expression's place, and must not
operands  the arrays and host numbers it looks values up in
values    Mask, Score, Dropout: the tree and the arrays that travel with it
text      a tree as Python, and back
arrays    a tree as values over a tile of indices
intervals a tree as what is surely true, or surely not, of a whole tile
duals     a score's derivatives, as another tree
shifts    whether a tree says the same all along a diagonal
"""
