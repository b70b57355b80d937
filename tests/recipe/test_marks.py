"""Laws of merging marked trees."""

from hypothesis import given, settings
from hypothesis import strategies as st

from deltakd.recipe.marks import Marked, merge, plain

trees = st.recursive(st.integers() | st.lists(st.integers()), lambda t: st.dictionaries(st.sampled_from("abcd"), t))
mappings = st.dictionaries(st.sampled_from("abcd"), trees)


def mark(value: object, place: str) -> Marked:
    if isinstance(value, dict):
        return Marked({key: mark(child, place) for key, child in value.items()}, place)
    return Marked([mark(item, place) for item in value] if isinstance(value, list) else value, place)


@settings(deadline=None)
@given(mappings, mappings)
def test_merge_keeps_all_of_the_upper_tree_and_of_the_lower_one_what_the_upper_does_not_mention(base, over):
    def law(merged: Marked, base: object, over: object) -> None:
        if not (isinstance(base, dict) and isinstance(over, dict)):
            assert plain(merged) == over and merged.place == "over"
            return
        assert set(merged.value) == set(base) | set(over)
        for key, child in merged.value.items():
            if key not in over:
                assert plain(child) == base[key] and child.place == "base"
            else:
                law(child, base.get(key), over[key])

    law(merge(mark(base, "base"), mark(over, "over")), base, over)
