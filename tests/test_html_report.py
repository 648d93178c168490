"""report.html: one file alike in every project, in which no text becomes markup."""

from html.parser import HTMLParser
from itertools import pairwise

import pytest
from launch import PROJECTS, module

NASTY = '<script>alert(1)</script> a | b & &amp; [x](y) <mark> "quoted" \'\u202e مرحبا 👩‍🚀 ' + "x" * 400
RECORDS = [{"event": "step", "step": n, "loss": 9.0 - n} for n in range(1, 6)]
RECORDS += [{"event": "step", "step": 6, "loss": None}, {"event": "evaluation", "step": 3, "f1": 0.5, "loss": 1.0}]


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.texts, self.points = set(), [], []

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.add(tag)
        assert not {name for name, _ in attributes} & {"src", "href", "onload", "onclick"}
        if tag == "path" and (path := dict(attributes)["d"]).endswith("h0"):
            self.points.append([tuple(map(float, point.split())) for point in path[1:-2].split("L")])

    def handle_data(self, data) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("project", PROJECTS)
def test_the_report_is_a_page_that_shows_each_text_as_it_is(project):
    table, page = module(project, "report").table, module(project, "html_report").page
    markdown = "\n".join(
        [f"# A {NASTY}", "", *table(["line", "te|xt"], [[1, NASTY], [2, "-"]]), "## Later", f"- {NASTY}"]
    )
    reader = Reader()
    reader.feed(page(markdown, RECORDS, "f1"))
    assert reader.tags <= {
        "html",
        "meta",
        "style",
        "h1",
        "h2",
        "p",
        "table",
        "tr",
        "th",
        "td",
        "div",
        "svg",
        "path",
        "text",
    }
    assert [text for text in reader.texts if text == " ".join(NASTY.split())] and "te|xt" in reader.texts
    assert sum(NASTY.strip() in text for text in reader.texts) == 3

    losses, losses_there, scores = reader.points  # of training and of validation, and one of the metric
    assert len(losses) == 5 and len(losses_there) == len(scores) == 1
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(losses))  # a falling loss, whose y grows downwards
    assert losses[2][0] == losses_there[0][0] and losses_there[0][1] > losses[-1][1]
