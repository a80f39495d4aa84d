"""The paper's numbers (configs/paper.json) and settings (the other configs), to put beside ours.

It does not import torch.
"""
import functools
import json

import flags
from common import HERE

NAMES = {"airplane": "plane", "automobile": "car"}  # CIFAR-10's classes as the paper calls them


@functools.cache
def published():
    """The content of configs/paper.json; accuracies are in percent unless the file says otherwise."""
    return json.loads((HERE / "configs" / "paper.json").read_text(encoding="utf-8"))


def base(data):
    """The paper's data set behind ours: cifar10 for cifar10-small."""
    return data.replace("-small", "")


def theirs(figure, data, line, share, kind):
    """The accuracy (percent) that the paper gives in a figure, or None where it gives none.

    data: a data set, or source->target. line: the name of the line in our figure; the baselines "AT" and
    "no AT" belong to no figure. share: |A|/N. kind: robust or clean.
    """
    found = published()["curves"].get("baselines" if line in ("AT", "no AT") else figure, {})
    found = found.get(base(data), {}).get(kind, {}).get(line)
    if not isinstance(found, dict):
        return found
    return next((v for f, v in found.items() if abs(float(f) - share) < 0.004), None)


def fig2(a, c=None):
    """The robust accuracy (percent) that Fig. 2 gives for CSAT on class `a` of CIFAR-10: on class c, or on
    B_val if c is None. None for classes that CIFAR-10 does not have."""
    told, a, c = published()["fig2"], NAMES.get(a, a), NAMES.get(c, c)
    if c is None:
        return told["robust_B_val"].get(a)
    if not {a, c} <= set(told["classes"]):
        return None
    return told["robust_rows_are_A"][told["classes"].index(a)][told["classes"].index(c)]


@functools.cache
def setting_on(data):
    """The flags of the paper's runs on `data` (a data set, or source->target), from configs/: {dest: value},
    empty for data that the paper does not have."""
    source, *target = base(data).split("->")
    folder = HERE / "configs"
    files = [folder / f"{source}.yaml", *(folder / "transfer" / f"{name}.yaml" for name in target)]
    if source not in published()["data sets"] or not all(file.exists() for file in files):
        return {}
    defaults = {flag[2:].replace("-", "_"): default for group in flags.FLAGS.values()
                for flag, default, *_ in group}
    found, *of_target = ({**defaults, **flags.from_yaml(file)} for file in files)
    of_source = {f"source's {k}": found[k] for k in ("norm", "eps")} if target else {}
    return found | of_source | {f"target's {k}": v for values in of_target for k, v in values.items()}


def comparable(data, setting):
    """The name under which theirs() looks up numbers to put beside runs on `data`: `data`, or "" if norm or
    eps (in a transfer, also those of the source's training) are not the paper's, whose numbers then mean
    something else."""
    told = setting_on(data)
    return data if all(setting.get(k, v) == v for k, v in told.items()
                        if k.split()[-1] in ("norm", "eps")) else ""


def not_the_papers(data, setting):
    """A sentence that lists where our setting differs from the paper's; empty if it does not, or if the paper
    does not have these data."""
    paper = setting_on(data)
    plain = lambda v: " ".join(map(str, v)) or "none" if isinstance(v, list) else v
    differ = [f"{k.replace('_', ' ')} {plain(v)} ({plain(paper[k])})" for k, v in setting.items()
              if k in paper and paper[k] != v]
    n = published()["data sets"].get(base(data).split("->")[0], {}).get("train")
    if paper and setting.get("N") != n:
        differ.insert(0, f"N {setting['N']:,} ({n:,})")
    if not differ:
        return ""
    return ("Not the paper's setting, so the differences from it are no reproduction. "
            f"Ours (the paper's): {', '.join(differ)}.")
