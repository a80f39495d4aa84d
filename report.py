"""Builds the paper's tables and figures from all results, the paper's numbers beside ours.

    python report.py

Files in: results/**/result.json, rank.json and eval-*.json, configs/. Files out: results/tables.md,
results/figures/*.png and *.svg, results/runs.csv (a row per run), and the tables in the files of --into.
"""
import re
from pathlib import Path

import flags
from common import UserError, say, script
from paper import results, short, tables
from runs import atomic


def fill_in(path, sections):
    """Puts sections, without figures, into a file, between <!-- table: TITLE --> and <!-- end -->."""
    bodies = {text[0].removeprefix("## "): "\n\n".join(t for t in text[1:] if t and not t.startswith("!"))
              for text in sections if text}
    text, marks = path.read_text(encoding="utf-8"), r"(?s)(<!-- table: (.+?) -->\n).*?(<!-- end -->)"
    for _, title, _ in re.findall(marks, text):
        if title not in bodies:
            raise UserError(f"{path} asks for the table {title!r}; there are: {', '.join(bodies)}")
    text = re.sub(marks, lambda match: f"{match[1]}\n{bodies[match[2]]}\n\n{match[3]}", text)
    atomic(path, lambda f: f.write(text.encode()))


def main(argv=None):
    """Reads all results; writes the figures, and tables.md with a section for each figure of the paper."""
    parser = flags.Parser(prog="report.py", description=__doc__)
    parser.add_argument("--results", type=flags.file_path, default=Path("results"), help="folder of the runs")
    parser.add_argument("--into", type=flags.file_path, metavar="FILE", nargs="+", default=[],
                        help="also put tables into these Markdown files, at their <!-- table: TITLE -->")
    args = parser.parse_args(argv)
    # [Run] and {path of a rank.json: its content}
    runs, rankings = results.read_runs(args.results), results.read_rankings(args.results)
    if not runs and not rankings:
        raise UserError(f"no results below {args.results}: first run sat.py, or ./run_all.sh digits")
    results.add_source_accuracies(runs)
    runs = results.without_repeats(runs)
    results.name_groups(runs)
    figure_folder = args.results / "figures"
    sections = [short.section(runs, figure_folder),
                tables.claims_section(runs, rankings), tables.matrix_section(runs, figure_folder),
                tables.difficulty_section(rankings, figure_folder),
                *(tables.curve_section(runs, figure_folder, f, rankings) for f in tables.CURVE_FIGURES),
                tables.cost_section(runs, rankings, figure_folder),
                tables.other_section(runs), tables.evaluation_section(args.results)]
    paragraphs = ["# Results",
                  "Accuracies in percent. One run: value [95 % Wilson interval]; several seeds: mean ± "
                  "standard deviation over seeds. Robust: classified correctly, also under the attack that "
                  "each table names, on test examples that were not used for selecting a checkpoint. Runs "
                  "that differ in threat model, evaluation, network or epochs have tables of their own.",
                  *(t for section in sections for t in section if t)]
    atomic(args.results / "tables.md", lambda f: f.write(("\n\n".join(paragraphs) + "\n").encode()))
    results.write_csv(args.results / "runs.csv", runs)
    for path in args.into:
        fill_in(path, sections)
    say(f"{len(runs)} runs -> {args.results}/tables.md, runs.csv and figures/")


if __name__ == "__main__":
    script(main)
