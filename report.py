"""Builds the paper's tables and figures from all results below the results folder, with the paper's numbers
beside ours.

    python report.py
Files in: results/**/result.json, rank.json and eval-*.json, configs/. Files out: results/tables.md,
results/figures/*.png and *.svg, and the tables in the files of --into.
"""
import re
from pathlib import Path

import common
import flags
from common import UserError, say
from paper import results, tables
from runs import atomic

INTRODUCTION = (
    "Accuracies in percent. One run: value [95 % Wilson interval]; several seeds: mean ± standard deviation "
    "over seeds. Robust: right, and still right under the attack that each table names, on test examples "
    "that were not used for selecting a checkpoint. Runs that differ in threat model, attack, n, network or "
    "epochs are in tables of their own.")


def fill_in(path, sections):
    """Copies the text of sections, without their figures, into a Markdown file: each section between its
    marks <!-- table: TITLE --> and <!-- end -->."""
    bodies = {text[0].removeprefix("## "): "\n\n".join(t for t in text[1:] if t and not t.startswith("!"))
              for text in sections if text}

    def body(match):
        """The two marks with the text of their section between them."""
        if match[2] not in bodies:
            raise UserError(f"{path} asks for the table {match[2]!r}; there are: {', '.join(bodies)}")
        return f"{match[1]}\n{bodies[match[2]]}\n\n{match[3]}"

    before = path.read_text(encoding="utf-8")
    after = re.sub(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", body, before, flags=re.S)
    atomic(path, lambda f: f.write(after.encode()))


def main(argv=None):
    """Reads all results; writes the figures, and tables.md with a section for each figure of the paper."""
    usage = "python report.py [--results DIR] [--into FILE ...]"
    parser = flags.Parser(prog="report.py", usage=usage, description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the runs")
    parser.add_argument("--into", type=Path, metavar="FILE", nargs="+", default=[],
                        help="also put tables into these Markdown files, at their <!-- table: TITLE -->")
    args = parser.parse_args(argv)
    runs, rankings = results.read_runs(args.results), results.read_rankings(args.results)
    if not runs and not rankings:
        raise UserError(f"no result.json or rank.json below {args.results}: "
                        "first run sat.py, or ./run_all.sh digits")
    runs = results.without_repeats(runs)
    results.name_groups(runs)
    results.add_source_accuracies(runs)
    out = args.results / "figures"
    sections = [tables.claims_section(runs), tables.matrix_section(runs, out),
                tables.difficulty_section(rankings, runs, out),
                *(tables.curve_section(runs, out, curves) for curves in tables.CURVES),
                tables.cost_section(runs, rankings, out), tables.evaluation_section(args.results)]
    text = ["# Results", INTRODUCTION, *(t for section in sections for t in section if t)]
    atomic(args.results / "tables.md", lambda f: f.write(("\n\n".join(text) + "\n").encode()))
    for path in args.into:
        fill_in(path, sections)
    say(f"{len(runs)} runs -> {args.results / 'tables.md'} and {out}/")


if __name__ == "__main__":
    common.script(main)
