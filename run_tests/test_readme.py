"""The README keeps its promises: its links lead somewhere, and its transcript still shows the code."""

import re
from pathlib import Path

HOUSE = Path(__file__).parent.parent
README = (HOUSE / "README.md").read_text(encoding="utf-8")


def line(path: str, number: str) -> str:
    return (HOUSE / path).read_text(encoding="utf-8").splitlines()[int(number) - 1].strip()


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 50
    assert [link for link in links if not (HOUSE / link).exists()] == []


def test_every_component_stands_in_the_table():
    for path in (HOUSE / "ref_numpy").glob("[!_]*.py"):
        assert f"(ref_numpy/{path.name})" in README


def test_the_debugger_stops_where_the_transcript_says():
    stops = re.findall(r"> (ref_numpy/\w+\.py)\((\d+)\)(\w+)\(\)\n    -> (.*)\n", README)
    assert len(stops) == 5
    for path, number, function, code in stops:
        assert line(path, number) == code, f"{path}:{number}"
        above = (HOUSE / path).read_text(encoding="utf-8").splitlines()[: int(number)]
        assert [text for text in above if text.startswith("def ")][-1].startswith(f"def {function}(")
    assert re.findall(r"break (ref_numpy/\w+\.py:\d+)", README) == [
        f"{path}:{n}" for path, n, *_ in (stops[0], stops[1])
    ]
