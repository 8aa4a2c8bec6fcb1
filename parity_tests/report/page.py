"""The page of a report, as HTML with its pictures inside, and as Markdown beside a picture."""

import base64
from collections.abc import Iterable, Mapping
from html import escape
from typing import NamedTuple

import numpy as np

from parity_tests.components import FILES
from parity_tests.report.collect import Findings, Kills, Row
from parity_tests.report.draw import histogram

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .6rem }
h2 { font-size: 1.15rem; margin-top: 2rem }
.verdict { padding: .8rem 1rem; border-radius: 6px; font-size: 1.1rem; border-left: 6px solid }
.well { background: #e3f3e6; border-color: #2e7d32 }
.ill { background: #fbe4e4; border-color: #c62828 }
table { border-collapse: collapse; width: 100% }
td, th { padding: .2rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.long { overflow-wrap: anywhere }
tr.ill td { background: #fbe4e4 }
img { max-width: 100% }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem }
.note { color: #555 }
svg { vertical-align: middle }
"""


class Report(NamedTuple):
    """All that a page says."""

    backend: str
    command: str
    findings: Findings
    kills: Kills | None
    environment: Mapping[str, str]


def verdict(report: Report) -> list[str]:
    """The two sentences that are read first."""
    findings = report.findings
    rows, failures = findings.rows, findings.failures
    cases, passed = sum(row.units.size for row in rows), sum(file.passed for file in findings.files)
    if findings.is_well:
        first = f"All is well: {passed:,} tests pass, and in {cases:,} cases no error exceeds its bound."
    else:
        first = f"{len(failures)} of {passed + len(failures):,} tests fail."
    lines = [first]
    if rows:
        nearest = max(rows, key=lambda row: row.units[-1])
        lines.append(
            f"Closest to the edge: {nearest.component} in {nearest.precision} on {nearest.device}, whose "
            f"{nearest.worst} is off by {number(nearest.units[-1])} of what is allowed."
        )
    if report.kills:
        caught, planted = report.kills.total
        lines.append(f"Of {planted} planted bugs the suite caught {caught} ({report.kills.date}).")
    return lines


def number(units: float) -> str:
    """Units of a bound, to two digits or, where they are few, to one."""
    if units == 0:
        return "0"
    if 0.1 <= units < 100:
        return f"{units:.2f}"
    return f"{units:.2g}" if 0.001 <= units < 0.1 else f"{units:.0e}"


def cells(row: Row) -> list[str]:
    """component, precision, device, cases, median, worst, in which result."""
    middle = float(np.median(row.units))
    return [
        row.component,
        row.precision,
        row.device,
        f"{row.units.size:,}",
        number(middle),
        number(row.units[-1]),
        row.worst,
    ]


HEAD = ["Component", "Question", "Device", "Cases", "Median", "Worst", "in"]
FILES_HEAD = ["Tests of", "Passed", "Failed", "Skipped", "Bugs caught"]
EXPLAINED = (
    "Each case has a largest error, here in units of what is allowed: at 1 a test fails. float64 is the "
    "question of the same mathematics, the others that of the rounding in their precision; the bounds "
    "are derived in parity_tests/tolerances.py."
)


def file_rows(report: Report) -> list[list[str]]:
    """Tests and planted bugs by test file; results that have to be equal exactly are here alone."""
    kills = report.kills.by_file if report.kills else {}
    rows = []
    for file in report.findings.files:
        caught = "{} of {}".format(*kills[file.name]) if file.name in kills else ""
        name = file.name.removeprefix("test_")
        rows.append([name, str(file.passed), str(len(file.failed)), str(file.skipped), caught])
    return rows


def html(report: Report, picture: bytes) -> str:
    """The page; every text in it is escaped."""
    findings = report.findings
    first, *others = (escape(line) for line in verdict(report))
    drawn = base64.b64encode(picture).decode("ascii")
    kills = report.kills.by_file if report.kills else {}
    body = [
        "<h1>Parity report</h1>",
        f'<p class="verdict {"well" if findings.is_well else "ill"}"><b>{first}</b>',
        "".join(f"<br>{line}" for line in others) + "</p>",
        f'<p class="note">{escape(report.backend)} against the reference: '
        f"<code>{escape(report.command)}</code>, {findings.seconds:.0f} s</p>",
    ]
    if findings.failures:
        body.append("<h2>What fails</h2>")
        body += [
            f"<p><b>{escape(name)}</b></p><pre>{escape(message)}</pre>" for name, message in findings.failures
        ]
    if findings.rows:
        body += [
            "<h2>How close to the edge</h2>",
            f'<img alt="Errors in units of their bounds" src="data:image/png;base64,{drawn}">',
            f'<p class="note">{escape(EXPLAINED)} Thin: least to largest; thick: nine cases of ten; stroke: '
            "median; dot: the worst of all.</p>",
            "<h2>Every component</h2>",
            _table([*HEAD, "Distribution", "Bugs"], (_row_html(row, kills) for row in findings.rows)),
        ]
    body.append("<h2>Every test file</h2>")
    listed = (_tr(row, classes=["", "n", "n", "n", "n"], is_ill=row[2] != "0") for row in file_rows(report))
    body.append(_table(FILES_HEAD, listed))
    if findings.not_judged:
        body.append("<h2>Not judged</h2><ul>")
        body += [f"<li>{escape(reason)}</li>" for reason in findings.not_judged] + ["</ul>"]
    body += ["<h2>Environment</h2>", _table([], (_tr(pair) for pair in report.environment.items()))]
    title = "Parity report: " + ("all is well" if findings.is_well else "something fails")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _table(head: Iterable[str], rows: Iterable[str]) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return "<table>" + (f"<tr>{names}</tr>" if names else "") + "\n".join(rows) + "</table>"


def _tr(texts: Iterable[str], classes: Iterable[str] | None = None, is_ill: bool = False) -> str:
    texts = list(texts)
    classes = list(classes or [""] * len(texts))
    inner = "".join(f'<td class="{c}">{escape(text)}</td>' for text, c in zip(texts, classes, strict=True))
    return f'<tr class="{"ill" if is_ill else ""}">{inner}</tr>'


def _row_html(row: Row, kills: Mapping[str, tuple[int, int]]) -> str:
    test = f"test_{FILES[row.component]}"
    caught = " of ".join(map(str, kills[test])) if test in kills else ""
    texts = _tr(cells(row), ["", "", "", "n", "n", "n", "long"], row.units[-1] > 1)
    return texts.removesuffix("</tr>") + f'<td>{histogram(row)}</td><td class="n">{caught}</td></tr>'


def markdown(report: Report, picture: str) -> str:
    """The same page for places that show Markdown, with the picture in a file beside it."""
    findings = report.findings
    first, *others = verdict(report)
    lines = ["# Parity report", "", f"**{_plain(first)}**", "", *(_plain(line) for line in others), ""]
    lines += [f"{_plain(report.backend)} against the reference; `{report.command}`, {findings.seconds:.0f} s"]
    if findings.failures:
        lines += ["", "## What fails", ""]
        lines += [f"- {_plain(name)}: {_plain(message)}" for name, message in findings.failures]
    if findings.rows:
        lines += ["", "## How close to the edge", "", f"![Errors in units of their bounds]({picture})", ""]
        lines += [EXPLAINED, "", *_markdown_table(HEAD, map(cells, findings.rows))]
    lines += ["", "## Every test file", "", *_markdown_table(FILES_HEAD, file_rows(report))]
    if findings.not_judged:
        lines += ["", "## Not judged", "", *(f"- {_plain(reason)}" for reason in findings.not_judged)]
    lines += ["", "## Environment", "", *_markdown_table(["What", "Here"], report.environment.items())]
    return "\n".join(lines) + "\n"


def _markdown_table(head: list[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([_plain(text) for text in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    for sign in "\\`*_[]|#":
        text = text.replace(sign, f"\\{sign}")
    return escape(text, quote=False)
