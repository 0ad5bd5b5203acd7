"""From runs to a table: medians, ratios within a round, and what is extrapolated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Result = Mapping[str, Any]
Round = Mapping[str, Result]
"""The result of each tool in one round; a tool that failed is missing."""

PREDICTING = ("predict", "inference")
"""What the tools call the stage in which the network runs."""
MEASURES = ("wall_s", "cpu_s", "process_wall_s", "peak_rss_mb", "peak_anonymous_mb")


def total_seconds(result: Result, rest_s: float = 0.0) -> float:
    """Return a run's seconds; of one that timed a few patches or tiles, all of them together.

    Args:
        result: of a run.
        rest_s: what the tool needs beside prediction, added to an extrapolated run.
    """
    if "seconds_a_unit" not in result:
        return float(result["wall_s"])
    return float(result["units"] * result["seconds_a_unit"] + rest_s)


def rest_seconds(result: Result) -> float:
    """Return what a whole run took outside of the stage in which the network runs."""
    stages = result["stages_s"]
    return float(result["wall_s"] - sum(stages.get(name, 0.0) for name in PREDICTING))


def with_totals(rounds: Sequence[Round], rests: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the rounds with ``total_s`` in each result.

    Args:
        rounds: as measured.
        rests: see :func:`total_seconds`, by tool.
    """
    return [
        {
            tool: {**result, "total_s": round(total_seconds(result, rests.get(tool, 0.0)), 3)}
            for tool, result in one.items()
        }
        for one in rounds
    ]


def ratios(rounds: Sequence[Round], tool: str, base: str, measure: str) -> list[float]:
    """Return a tool's measure over the base's, for each round that has both.

    A tool that does one stage alone names it (``beside``): its seconds are over those of the
    base's stage, and nothing else of it is compared.
    """
    found = []
    for one in rounds:
        if tool not in one or base not in one:
            continue
        stage = one[tool].get("beside")
        if stage is None:
            found.append(one[tool][measure] / one[base][measure])
        elif measure == "total_s":
            found.append(one[tool][measure] / one[base]["stages_s"][stage])
    return found


def summary(rounds: Sequence[Round], base: str) -> dict[str, dict[str, Any]]:
    """Return the medians of each tool, and of its ratios to the base within a round."""
    tools = dict.fromkeys(tool for one in rounds for tool in one)
    return {tool: _of_tool(rounds, tool, base) for tool in tools}


def _of_tool(rounds: Sequence[Round], tool: str, base: str) -> dict[str, Any]:
    results = [one[tool] for one in rounds if tool in one]
    row: dict[str, Any] = {"rounds": len(results), "extrapolated": "seconds_a_unit" in results[0]}
    for measure in ("total_s", *MEASURES):
        values = [result[measure] for result in results if measure in result]
        if values:
            row[measure] = round(median(values), 3)
    # What a few patches took of processors and memory says nothing of the whole.
    for measure in ("total_s",) if row["extrapolated"] else ("total_s", "cpu_s", "peak_rss_mb"):
        found = ratios(rounds, tool, base, measure)
        if found:
            row[f"{measure} ratio"] = round(median(found), 2)
            row[f"{measure} ratios"] = [round(min(found), 2), round(max(found), 2)]
    for fact in ("units", "unit", "timed_units", "objects", "precision", "beside"):
        if fact in results[-1]:
            row[fact] = results[-1][fact]
    return row


def markdown(table: Mapping[str, Mapping[str, Any]], base: str) -> str:
    """Return the table as a person reads it; ratios are to the base."""
    titles = ["tool", "seconds", f"/ {base}", "CPU s", "peak MB", "patches or tiles", "objects"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for tool, row in table.items():
        low, high = row.get("total_s ratios", ("", ""))
        beside = f" of {row['beside']}" if "beside" in row else ""
        cells = [
            tool,
            f"{row['total_s']:.1f}" + (" (extrapolated)" if row["extrapolated"] else ""),
            f"{row['total_s ratio']} ({low}-{high}){beside}" if "total_s ratio" in row else "",
            "" if row["extrapolated"] else f"{row['cpu_s']:.1f}",
            "" if row["extrapolated"] else str(row.get("peak_rss_mb", "")),
            _units(row),
            " / ".join(str(number) for number in row.get("objects", {}).values()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _units(row: Mapping[str, Any]) -> str:
    timed = f", {row['timed_units']} timed" if "timed_units" in row else ""
    return f"{row['units']} ({row['unit']}{timed})"
