"""What follows from an outlook, in one sentence with its numbers, by thresholds that docs/sweeps.md gives reasons for.

They come from few measurements at toy size and tell regimes apart, not good alphas from better ones.
"""

from deltakd.study.outlook import Outlook

# log s - log t at the reference tokens spread by 0.5 where delta tied, by 3.71 and 4.3 where it lost: their middle.
MOST_SPREAD = 1.4
# Nats per token. Raw models had 0.3 to 0.4 where they knew the text, and 3.2 and 5.0 where they hardly did.
KNOWN = 2.0
# Where the raw models knew the text 0.25 and 0.5 tied, or 0.5 won in a long training; 1 lost, or tied in that one.
MOST_ALPHA = 0.5


def advise(found: Outlook, anchor: str = "teacher") -> str:
    """Return the sentence: which alpha of the grid to keep, or why none."""
    student, teacher = found.cross_entropy["student_raw"], found.cross_entropy["teacher_raw"]
    raw = f"cross-entropy on the references: student_raw {student:.2f}, teacher_raw {teacher:.2f} nats a token"
    spread = f"log s - log t spreads by {found.ratio_spread:.2f} there"
    if min(student, teacher) > KNOWN:
        return (
            f"Neither raw model knows this text ({raw}, both above {KNOWN:g}; {spread}): delta will import noise. "
            "Train with objective.target=teacher, or take raw models that have read such text."
        )
    if found.ratio_spread > MOST_SPREAD:
        return (
            f"The raw models disagree at the references ({spread}, more than {MOST_SPREAD:g}; {raw}): delta will "
            "import noise. Train with objective.target=teacher, or with raw models that have read such text alike."
        )
    if anchor != "teacher":
        return (
            f"The raw models know this text and agree on it ({raw}; {spread}, at most {MOST_SPREAD:g}); which alpha to "
            "keep with anchor student has not been measured."
        )
    nearest = min((one.temperature for one in found.targets), key=lambda one: abs(one - 1))  # the models' own are at 1
    at = {one.alpha: one.cross_entropy for one in found.targets if one.temperature == nearest}
    kept = max((alpha for alpha in at if 0 < alpha <= MOST_ALPHA and at[alpha] < student), default=None)
    if not any(0 < alpha <= MOST_ALPHA for alpha in at):
        return (
            f"The raw models know this text and agree on it ({raw}; {spread}, at most {MOST_SPREAD:g}), and no alpha "
            f"of this grid lies above 0 and up to {MOST_ALPHA:g}, where delta did not lose. Ask for one there."
        )
    if kept is None:
        return (
            f"Keep alpha = 0 ({raw}; {spread}): at no alpha of this grid above 0 and up to {MOST_ALPHA:g} is the "
            "target better on the references than the raw student."
        )
    return (
        f"Keep alpha = {kept:g}: the raw models know this text and agree on it ({raw}; {spread}, at most "
        f"{MOST_SPREAD:g}), and the target's cross-entropy there is {at[kept]:.3f}, the teacher's "
        f"{found.cross_entropy['teacher']:.3f}. Alpha 1 was measured to lose, or in long "
        "trainings to tie."
    )


def markdown(found: Outlook, name: str) -> str:
    """Return the frozen models' numbers and a row for each target."""
    titles = ["alpha", "temperature", "cross-entropy", "accuracy", "entropy", "KL to teacher", "KL to raw student"]
    lines = [titles, ["---"] * len(titles)]
    for one in found.targets:
        numbers = (one.cross_entropy, one.accuracy, one.entropy, one.kl_to_teacher, one.kl_to_student_raw)
        lines.append([f"{one.alpha:g}", f"{one.temperature:g}", *(f"{value:.3f}" for value in numbers)])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    models = ", ".join(f"{model} {value:.3f}" for model, value in found.cross_entropy.items())
    return (
        f"# The delta target of {name}\n\n{found.num_tokens:,} reference tokens. Cross-entropy of the models: {models} "
        f"nats a token. log student_raw - log teacher_raw there: mean {found.ratio_mean:+.3f}, standard deviation "
        f"{found.ratio_spread:.3f}.\n\n{table}\n\nMeans over reference tokens, nats a token; all numbers of a row at "
        "its temperature. KL: KL(target, model).\n"
    )
