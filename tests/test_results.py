"""The pages of results say what their data say, and no data lie about that no page uses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "results"
SPEC = importlib.util.spec_from_file_location("build_results", FOLDER / "build.py")
assert SPEC is not None and SPEC.loader is not None
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)


def test_pages_and_figure_are_not_stale_and_all_data_are_used():
    assert build.main(check=True) == []
    assert {path.stem for path in (FOLDER / "data").iterdir()} == set(build.PAGES.values())
    assert {path for path in build.PAGES if path.parent == FOLDER} == set(FOLDER.glob("*.md"))


def test_a_number_that_was_changed_by_hand_is_put_right():
    page, data = (FOLDER / "disposal.md").read_text("utf-8"), build.Data("disposal")
    number = build.MARKER.search(page)
    assert number is not None
    changed = f"{page[: number.start(2)]}99.9{page[number.end(2) :]}"
    assert build.written(changed, data) == page


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.md")), ids=lambda path: path.stem)
def test_a_page_is_short(path: Path):
    assert len(path.read_text("utf-8").split()) <= 800


def test_an_interval_by_hand():
    """1, 2, 3: mean 2, deviation 1; t(0.975, 2) = 4.303; 4.303 / sqrt(3) = 2.48. A difference goes seed by seed."""
    some, others = build.Seeds({6: 1.0, 7: 2.0, 8: 3.0}), build.Seeds({8: 2.5, 6: 0.5, 7: 1.5})
    assert str(some) == "2.0 ± 2.5" and str(some - others) == "0.5 ± 0.0"
    assert str(build.Seeds({0: -0.04})) == "0.0"
    with pytest.raises(ValueError, match="seeds"):
        some - build.Seeds({6: 1.0})


def test_a_name_that_no_result_has_is_refused():
    data = build.Data("disposal")
    with pytest.raises(LookupError, match="no result"):
        build.written('The <!--=acc_t("both/rnd")--><!--/-->', data)
    with pytest.raises(ValueError, match="two results"):
        build.written('The <!--=pl("both/null-both",own)--><!--/-->', data)
    with pytest.raises(ValueError, match="no Markdown"):
        build.written('- <!--=acc_t("both/TL")--><!--/-->', data)
