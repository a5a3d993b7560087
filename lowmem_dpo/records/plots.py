"""PNG plots of a run, drawn from its metrics.jsonl."""

from pathlib import Path

from lowmem_dpo.records.folder import read_metrics

PLOTS = {
    "loss": ("loss", "eval_loss"),
    "rewards": (
        "rewards/chosen",
        "rewards/rejected",
        "eval_rewards/chosen",
        "eval_rewards/rejected",
    ),
    "margins": ("rewards/margins", "eval_rewards/margins"),
    "accuracies": ("rewards/accuracies", "eval_rewards/accuracies"),
    "logps": ("logps/chosen", "logps/rejected"),
}


def draw_plots(metrics_path: Path, directory: Path) -> list[Path]:
    """Draw loss, rewards, margins, accuracies and logps over the steps.

    Args:
        metrics_path: A run's metrics.jsonl.
        directory: Receives one PNG a plot.

    Returns:
        The files written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_path)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for title, names in PLOTS.items():
        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                marker = "o" if name.startswith("eval_") or len(points) == 1 else None
                axes.plot(*zip(*points, strict=True), label=name, marker=marker)
        axes.set(xlabel="step", title=title)
        axes.legend()
        axes.grid(alpha=0.3)
        path = directory / f"{title}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written
