"""Stored out of canonical and canonical out of stored: any tiling, any orientation, any range of rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.kernels.transpose import turn
from converters.names import Part, Row, as_matrix
from converters.transforms import assemble, copy_into, join, part_view


@st.composite
def tilings(draw):
    """A stored matrix cut into a grid of pieces, each of a canonical tensor of its own or of one shared by a column."""
    heights = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    widths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    turned = draw(st.booleans())
    parts = []
    for across, width in enumerate(widths):
        row = 0
        for height in heights:  # one canonical tensor for each column of tiles, cut into pieces along its height
            col = sum(widths[:across])
            total = sum(heights)
            if turned:
                shape, rows, cols = (width, total), None, (row, row + height)
            else:
                shape, rows, cols = (total, width), (row, row + height), None
            parts.append(Part(f"t{across}", shape, row, col, turned, rows, cols))
            row += height
    order = draw(st.permutations(parts))
    return Row("stored", (sum(heights), sum(widths)), tuple(order))


@given(tilings(), st.data())
@settings(max_examples=150, deadline=None)
def test_assembled_rows_are_those_of_the_whole(row, data):
    shapes = {part.name: part.shape for part in row.parts}
    canonical = {name: torch.randn(shape) for name, shape in shapes.items()}
    height, width = row.shape
    whole = torch.full((height, width), torch.nan)
    for part in row.parts:
        rows, cols = part.rows or (0, part.shape[0]), part.cols or (0, part.shape[1])
        piece = canonical[part.name][rows[0] : rows[1], cols[0] : cols[1]]
        piece = piece.T if part.transposed else piece
        whole[part.row : part.row + piece.shape[0], part.col : part.col + piece.shape[1]] = piece
    top = data.draw(st.integers(0, height - 1))
    bottom = data.draw(st.integers(top + 1, height))

    def pieces_of(name, rows):
        """As a reader that makes only the rows that are asked for."""
        return [(Part(name, shapes[name], rows=(rows.start, rows.stop)), canonical[name][rows])]

    assert torch.equal(assemble(row, pieces_of, slice(top, bottom), torch.float32), whole[top:bottom])
    # and back: each canonical tensor out of its pieces in the stored one
    for name, tensor in canonical.items():
        found = [(part, part_view(whole, part)) for part in row.parts if part.name == name]
        first = data.draw(st.integers(0, tensor.shape[0] - 1))
        assert torch.equal(join(found, slice(first, None), torch.float32), tensor[first:])


def test_a_gap_is_an_error():
    row = Row("stored", (4, 4), (Part("t", (3, 4)),))
    with pytest.raises(ValueError, match="do not fill"):
        assemble(row, lambda name, rows: [(Part("t", (3, 4)), torch.zeros(3, 4))], slice(0, 4), torch.float32)


def test_what_lies_there_is_not_copied():
    tensor = torch.randn(6, 4)
    row = Row("stored", (6, 4), (Part("t", (6, 4)),))
    found = assemble(row, lambda name, rows: [(Part("t", (6, 4)), tensor)], slice(2, 5), torch.float32)
    assert found.data_ptr() == tensor[2:].data_ptr()


def test_vectors_and_fused_experts():
    assert as_matrix((5,)) == (5, 1) and as_matrix((2, 3, 4)) == (6, 4) and as_matrix(()) == (1, 1)
    fused = torch.arange(2 * 3 * 4).view(2, 3, 4)  # [E, in, out']
    part = Part("e1", (2, 3), row=3, col=2, transposed=True)
    assert torch.equal(part_view(fused, part), fused[1, :, 2:].T)
    assert torch.equal(part_view(torch.arange(6), Part("half", (6,), rows=(2, 4), row=2)), torch.arange(2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (32, 64), (33, 65), (100, 7), (257, 200)])
def test_turn(shape, dtype):
    source = torch.randn(shape[0], shape[1] + 3).to(dtype)[:, 1 : shape[1] + 1]
    target = torch.zeros(shape[1], shape[0] + 2, dtype=torch.float32).to(dtype)[:, : shape[0]]
    turn(source, target)
    assert torch.equal(target.float(), source.float().T)


def test_copy_into_takes_any_strides():
    source = torch.randn(300, 200).bfloat16()
    for given_ in (source, source.T.contiguous().T, source[::2, ::3], source.T.contiguous().T[5:, 7:]):
        target = torch.zeros(given_.shape, dtype=torch.bfloat16)
        copy_into(target, given_)
        assert torch.equal(target, given_)
