"""redsm5_nli with a user's own posts and runs: what the report shows of them, folds pooled, runs side by side."""

import html
import json
import shutil
from pathlib import Path

from launch import ran

from redsm5_nli.report import table

FILES = ("config", "results")


def read_cells(lines: list[str]) -> list[dict[str, str]]:
    """The rows of a Markdown table, by column."""
    header, _, *rows = [line.strip().removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_results_lists_runs_newest_first_and_by_score(short_run, tmp_path):
    made = {"old": ("2025-01-31T23:59:59+00:00", 0.7), "new": ("2025-11-02T08:00:00+00:00", 0.5), "none": (None, 0.9)}
    for place, (name, (started, f1)) in enumerate(made.items()):
        run = shutil.copytree(short_run("redsm5_nli"), tmp_path / name)
        content, results = (json.loads((run / f"{file}.json").read_text(encoding="utf-8")) for file in FILES)
        for key in ("started", "command"):
            content.pop(key, None)
        content["config"]["rank"] = 2**place
        content |= {"started": started, "command": f"train.py --rank {2**place} | tee log"} if started else {}
        results["validation"]["at_half"]["f1_macro"], results["seconds"] = f1, 3661.4
        for file, value in zip(FILES, (content, results)):
            (run / f"{file}.json").write_text(json.dumps(value), encoding="utf-8")
    (tmp_path / "old/results.json").unlink()

    runs = ("redsm5_nli/results.py", "--runs", *(tmp_path / name for name in made))
    rows = read_cells(ran(*runs).splitlines()[:-1])
    assert [Path(row["run"]).name for row in rows] == ["new", "old", "none"]
    assert [row["started"] for row in rows] == ["2025-11-02 08:00:00", "2025-01-31 23:59:59", "-"]
    assert [row["command"] for row in rows] == [*(f"train.py --rank {n} &#124; tee log" for n in (2, 1)), "-"]
    assert [row["time"] for row in rows] == ["1:01:01", "-", "1:01:01"]
    assert [row["validation f1_macro"] for row in rows] == ["0.5000", "-", "0.9000"]
    columns = list(rows[0])
    assert columns[columns.index("run") + 1 : columns.index("validation f1_macro")] == ["rank"]
    rows = read_cells(ran(*runs, "--sort", "f1_macro").splitlines()[:-1])
    assert [Path(row["run"]).name for row in rows] == ["none", "new", "old"]


def test_a_text_stays_in_its_cell():
    text = "a | b\\| c\nd\r\n\u2028e <script>alert(1)</script> ![x](http://x.example/y.png) &lt;"
    line = table(["text", "next"], [[text, "x"]])[2]
    assert line.count("|") == 3 and not {*"\n\r\u2028<["} & {*line} and line.endswith(" | x |")
    assert html.unescape(line[2:-6]) == " ".join(text.split())
