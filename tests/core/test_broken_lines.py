"""Long lines are broken between words, and lose none."""

from hypothesis import given
from hypothesis import strategies as st

from care_lens.core.display import broken


@given(
    st.lists(st.text("abc-", min_size=1, max_size=12), min_size=1, max_size=60), st.integers(0, 6), st.integers(30, 80)
)
def test_words_stay_and_lines_fit(words, inset, widest):
    line = " " * inset + " ".join(words)
    lines = broken(line, widest)
    assert " ".join(lines).split() == words
    assert all(len(one) <= widest for one in lines) and (len(line) > widest or lines == [line])
    assert all(one.startswith(" " * (inset + 2)) for one in lines[1:])
